"""The allocator's own lock; see `_lock.h`."""

from libc.stdint cimport uintptr_t

cdef extern from "_lock.h" nogil:
    ctypedef struct kv_lock_t:
        pass
    int kv_lock_init(kv_lock_t *lock)
    void kv_lock_destroy(kv_lock_t *lock)
    uintptr_t kv_thread()
    bint kv_lock_try(kv_lock_t *lock)
    void kv_lock(kv_lock_t *lock)
    void kv_unlock(kv_lock_t *lock)
    void kv_lock_wait(kv_lock_t *lock)
    void kv_lock_wake(kv_lock_t *lock)
    void kv_lock_runs_python(kv_lock_t *lock, bint run)
    bint kv_lock_is_mine(kv_lock_t *lock)
    ctypedef struct kv_turn_t:
        uintptr_t thread
    bint kv_turn_take(kv_turn_t *turn)
    bint kv_turn_give(kv_turn_t *turn)
    bint kv_turn_is_idle(const kv_turn_t *turn)
    void kv_turn_wants(kv_turn_t *turn, int change)
