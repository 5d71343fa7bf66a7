/* A seeded hash of token ids: four lanes of 64 x 64 -> 128 bit multiplications, folded (the construction of wyhash).
 * It need not withstand an attack: a candidate is always compared token by token, and what precedes it by identity. */
#ifndef KVCACHE_HASH_H
#define KVCACHE_HASH_H

#include <stdint.h>
#include <string.h>

static inline uint64_t kv_fold(uint64_t a, uint64_t b)
{
    unsigned __int128 product = (unsigned __int128)a * b;
    return (uint64_t)product ^ (uint64_t)(product >> 64);
}

static inline uint64_t kv_word(const int32_t *ids)
{
    uint64_t word;
    memcpy(&word, ids, sizeof(word));
    return word;
}

static inline uint64_t kv_hash_ids(const int32_t *ids, int64_t count, const uint64_t *seed)
{
    uint64_t hash = seed[0] ^ (uint64_t)count, other = seed[1];
    int64_t at = 0;
    for (; at + 8 <= count; at += 8) {
        hash = kv_fold(kv_word(ids + at) ^ seed[2], kv_word(ids + at + 2) ^ hash);
        other = kv_fold(kv_word(ids + at + 4) ^ seed[3], kv_word(ids + at + 6) ^ other);
    }
    for (; at < count; at++)
        hash = kv_fold((uint64_t)(uint32_t)ids[at] ^ seed[2], hash ^ seed[3]);
    return kv_fold(hash ^ seed[1], other ^ seed[0]);
}

/* What follows entry `parent` of this generation, or, with a negative one, begins a prompt under a salt. */
static inline uint64_t kv_hash_after(uint64_t content, int32_t parent, uint32_t generation, const uint64_t *seed)
{
    return kv_fold(content ^ seed[2], ((uint64_t)generation << 32 | (uint32_t)parent) ^ seed[3]);
}

#endif
