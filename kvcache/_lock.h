/* The allocator's own lock: one compare-and-swap when nobody else wants it, a sleeping wait when somebody does.
 *
 * A thread that holds the interpreter's lock (GIL) may only try this lock; before it waits it gives the GIL up.
 */
#ifndef KVCACHE_LOCK_H
#define KVCACHE_LOCK_H

#include <pthread.h>
#include <stdint.h>

enum { KV_FREE = 0, KV_HELD = 1, KV_CONTENDED = 2 };
enum { KV_SPINS = 1024 }; /* some 30 us: most calls are done by then, and a sleeper costs the other side a wake-up */

typedef struct {
    int state;              /* KV_FREE, KV_HELD, or KV_CONTENDED: held, and somebody may sleep */
    uintptr_t runner;       /* the thread that runs Python under the lock, 0 for none */
    uint64_t turn;          /* counts kv_lock_wake calls; written under the lock and `sleep` */
    pthread_mutex_t sleep;
    pthread_cond_t unlocked;
    pthread_cond_t woken;
} kv_lock_t;

static inline int kv_lock_init(kv_lock_t *lock)
{
    lock->state = KV_FREE;
    lock->runner = 0;
    lock->turn = 0;
    if (pthread_mutex_init(&lock->sleep, NULL))
        return -1;
    if (pthread_cond_init(&lock->unlocked, NULL))
        return -1;
    return pthread_cond_init(&lock->woken, NULL) ? -1 : 0;
}

static inline void kv_lock_destroy(kv_lock_t *lock)
{
    pthread_cond_destroy(&lock->woken);
    pthread_cond_destroy(&lock->unlocked);
    pthread_mutex_destroy(&lock->sleep);
}

static inline uintptr_t kv_thread(void)
{
    return (uintptr_t)pthread_self();
}

static inline int kv_lock_try(kv_lock_t *lock)
{
    int expected = KV_FREE;
    return __atomic_compare_exchange_n(&lock->state, &expected, KV_HELD, 0, __ATOMIC_ACQUIRE, __ATOMIC_RELAXED);
}

static inline void kv_lock_sleep(kv_lock_t *lock)
{
    while (__atomic_exchange_n(&lock->state, KV_CONTENDED, __ATOMIC_ACQUIRE) != KV_FREE) {
        pthread_mutex_lock(&lock->sleep);
        while (__atomic_load_n(&lock->state, __ATOMIC_RELAXED) == KV_CONTENDED)
            pthread_cond_wait(&lock->unlocked, &lock->sleep);
        pthread_mutex_unlock(&lock->sleep);
    }
}

static inline void kv_pause(void)
{
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("isb"); /* waits longer than yield, which does nothing on most */
#endif
}

/* Waits for as long as it takes: never call it while holding the GIL. */
static inline void kv_lock(kv_lock_t *lock)
{
    for (int spin = 0; spin < KV_SPINS; spin++) {
        if (__atomic_load_n(&lock->state, __ATOMIC_RELAXED) == KV_FREE && kv_lock_try(lock))
            return;
        kv_pause();
    }
    kv_lock_sleep(lock);
}

static inline void kv_unlock(kv_lock_t *lock)
{
    if (__atomic_exchange_n(&lock->state, KV_FREE, __ATOMIC_RELEASE) == KV_CONTENDED) {
        pthread_mutex_lock(&lock->sleep);
        pthread_cond_broadcast(&lock->unlocked);
        pthread_mutex_unlock(&lock->sleep);
    }
}

/* Gives the lock up, sleeps until the next kv_lock_wake, takes the lock again. */
static inline void kv_lock_wait(kv_lock_t *lock)
{
    uint64_t turn = lock->turn;
    kv_unlock(lock);
    pthread_mutex_lock(&lock->sleep);
    while (lock->turn == turn)
        pthread_cond_wait(&lock->woken, &lock->sleep);
    pthread_mutex_unlock(&lock->sleep);
    kv_lock(lock);
}

/* Under the lock: wakes everybody in kv_lock_wait. */
static inline void kv_lock_wake(kv_lock_t *lock)
{
    pthread_mutex_lock(&lock->sleep);
    lock->turn++;
    pthread_cond_broadcast(&lock->woken);
    pthread_mutex_unlock(&lock->sleep);
}

/* Python is about to run under the lock (run = 1), or has run: the same thread must not wait for the lock then. */
static inline void kv_lock_runs_python(kv_lock_t *lock, int run)
{
    __atomic_store_n(&lock->runner, run ? kv_thread() : 0, __ATOMIC_RELAXED);
}

static inline int kv_lock_is_mine(kv_lock_t *lock)
{
    return __atomic_load_n(&lock->runner, __ATOMIC_RELAXED) == kv_thread();
}

/* A turn that one thread has at a time; all zero is a turn that nobody has. Who waits for it says so before it tries
 * once more, and sleeps in kv_lock_wait of a lock; who gives it up and is told of waiters wakes them there. */
typedef struct {
    uintptr_t thread;
    int64_t waiters;
} kv_turn_t;

static inline int kv_turn_take(kv_turn_t *turn)
{
    uintptr_t nobody = 0;
    return __atomic_compare_exchange_n(&turn->thread, &nobody, kv_thread(), 0, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);
}

static inline int kv_turn_give(kv_turn_t *turn)
{
    __atomic_store_n(&turn->thread, 0, __ATOMIC_SEQ_CST);
    return __atomic_load_n(&turn->waiters, __ATOMIC_SEQ_CST) != 0;
}

/* Whether nobody has the turn, and the GIL keeps it so until the caller is done. */
static inline int kv_turn_is_idle(const kv_turn_t *turn)
{
#ifdef Py_GIL_DISABLED
    return 0;
#else
    return __atomic_load_n(&turn->thread, __ATOMIC_RELAXED) == 0;
#endif
}

static inline void kv_turn_wants(kv_turn_t *turn, int change)
{
    __atomic_fetch_add(&turn->waiters, change, __ATOMIC_SEQ_CST);
}

#endif
