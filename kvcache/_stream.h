/* A memmove past the caches, for more bytes than they hold.

   An ordinary store first reads the line that it is going to overwrite: of three transfers that a copy makes in
   memory, one is for nothing. Streaming stores leave it out. They would only hurt where the target is in the caches
   anyway, or is read before the caches have forgotten it. */

#ifndef KVCACHE_STREAM_H
#define KVCACHE_STREAM_H

#include <stdint.h>
#include <string.h>

#if defined(__SSE2__)

#include <emmintrin.h>

#define KV_LINE 64

/* A line, read whole before it is written; `to` begins a line. */
static inline void kv_stream_line(char *to, const char *from) {
    __m128i first = _mm_loadu_si128((const __m128i *)from);
    __m128i second = _mm_loadu_si128((const __m128i *)(from + 16));
    __m128i third = _mm_loadu_si128((const __m128i *)(from + 32));
    __m128i fourth = _mm_loadu_si128((const __m128i *)(from + 48));
    _mm_stream_si128((__m128i *)to, first);
    _mm_stream_si128((__m128i *)(to + 16), second);
    _mm_stream_si128((__m128i *)(to + 32), third);
    _mm_stream_si128((__m128i *)(to + 48), fourth);
}

static inline void kv_stream_forwards(char *to, const char *from, size_t size) {
    size_t part = (size_t)(-(uintptr_t)to % KV_LINE);
    if (part > size) part = size;
    memmove(to, from, part);
    for (; size - part >= KV_LINE; part += KV_LINE) kv_stream_line(to + part, from + part);
    memmove(to + part, from + part, size - part);
}

static inline void kv_stream_backwards(char *to, const char *from, size_t size) {
    size_t part = (size_t)((uintptr_t)(to + size) % KV_LINE);
    if (part > size) part = size;
    size -= part;
    memmove(to + size, from + size, part);
    for (; size >= KV_LINE; size -= KV_LINE) kv_stream_line(to + size - KV_LINE, from + size - KV_LINE);
    memmove(to, from, size);
}

/* The ranges may overlap. Other threads see the bytes after kv_stream_end. */
static inline void kv_stream(char *to, const char *from, size_t size) {
    if ((uintptr_t)to - (uintptr_t)from < size)
        kv_stream_backwards(to, from, size);
    else
        kv_stream_forwards(to, from, size);
}

static inline void kv_stream_end(void) { _mm_sfence(); }

#else

static inline void kv_stream(char *to, const char *from, size_t size) { memmove(to, from, size); }
static inline void kv_stream_end(void) {}

#endif

#endif
