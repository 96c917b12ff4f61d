"""What the C source of token merging takes from AVX-512, for processors with AVX2 only: sixteen numbers in halves."""

SOURCE = r"""
#include <immintrin.h>
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#ifndef __AVX2__
#error this processor has no AVX2
#endif

#define INLINE static inline __attribute__((always_inline))
typedef struct { const void *data; int64_t half; } Floats; /* bfloat16 where half is not 0, else float32 */
typedef float Numbers __attribute__((vector_size(64)));
typedef int32_t Wholes __attribute__((vector_size(64)));
typedef uint32_t Bits __attribute__((vector_size(64)));

INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
INLINE int64_t up(int64_t value, int64_t step) { return (value + step - 1) / step * step; }
INLINE uint16_t head16(int64_t n) { return n >= 16 ? 0xffff : n <= 0 ? 0 : (1u << n) - 1; }
INLINE Numbers all(float x) { return (Numbers){x, x, x, x, x, x, x, x, x, x, x, x, x, x, x, x}; }
INLINE Wholes mask_of(uint16_t bits) {
    return (((Wholes){0} + bits) & (Wholes){1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1 << 10, 1 << 11, 1 << 12, 1 << 13,
                                            1 << 14, 1 << 15}) != 0;
}
INLINE uint16_t bits_of(Wholes mask) {
    __m256 half[2];
    memcpy(half, &mask, 64);
    return _mm256_movemask_ps(half[0]) | _mm256_movemask_ps(half[1]) << 8;
}
INLINE Numbers read16(const float *from, uint16_t mask) { /* the first ones, as `head16` has them */
    Numbers x = {0};
    if (mask == 0xffff) memcpy(&x, from, 64);
    else for (int i = 0; mask >> i & 1; i++) x[i] = from[i];
    return x;
}
INLINE void write16(float *to, uint16_t mask, Numbers x) {
    if (mask == 0xffff) memcpy(to, &x, 64);
    else for (int i = 0; mask >> i & 1; i++) to[i] = x[i];
}
INLINE Numbers load(Floats from, int64_t at, uint16_t mask) {
    if (!from.half) return read16((const float *)from.data + at, mask);
    Bits bits = {0};
    for (int i = 0; i < 16 && mask >> i & 1; i++) bits[i] = (uint32_t)((const uint16_t *)from.data)[at + i] << 16;
    return (Numbers)bits;
}
INLINE void store(void *to, int64_t half, int64_t at, Numbers x, uint16_t mask) {
    if (!half) { write16((float *)to + at, mask, x); return; }
    Bits bits = (Bits)x;
    for (int i = 0; i < 16 && mask >> i & 1; i++) { /* to nearest, ties to even */
        uint32_t one = x[i] == x[i] ? bits[i] + (bits[i] >> 16 & 1) + 0x7fff : 0x7fc00000;
        ((uint16_t *)to)[at + i] = one >> 16;
    }
}
INLINE float sum16(Numbers x) { float sum = 0; for (int i = 0; i < 16; i++) sum += x[i]; return sum; }
INLINE float least16(Numbers x) {
    float least = x[0];
    for (int i = 1; i < 16; i++) if (x[i] < least) least = x[i];
    return least;
}
INLINE int32_t least_whole(uint16_t mask, Wholes x) {
    int32_t least = INT32_MAX;
    for (int i = 0; i < 16; i++) if (mask >> i & 1 && x[i] < least) least = x[i];
    return least;
}
INLINE Numbers root(Numbers x) {
    __m256 half[2];
    memcpy(half, &x, 64);
    half[0] = _mm256_sqrt_ps(half[0]), half[1] = _mm256_sqrt_ps(half[1]);
    memcpy(&x, half, 64);
    return x;
}
INLINE Numbers choose(Numbers a, Wholes m, Numbers b) { return (Numbers)(((Wholes)a & ~m) | ((Wholes)b & m)); }
INLINE void transpose(Wholes row[16]) {
    Wholes old[16];
    memcpy(old, row, sizeof old);
    for (int i = 0; i < 16; i++) for (int j = 0; j < 16; j++) row[i][j] = old[j][i];
}

/* c[rows, 64] = a[rows, depth] b[depth, 64] */
static void product(const float *a, int64_t a_row, const float *b, int64_t b_row, float *c, int64_t c_row,
                    int64_t rows, int64_t depth, float scale, int wide, int add, int half)
{
    for (int64_t r = 0; r < rows; r++) {
        __m256 sum[8];
        for (int w = 0; w < 8; w++) sum[w] = _mm256_setzero_ps();
        for (int64_t d = 0; d < depth; d++) {
            __m256 factor = _mm256_set1_ps(a[r * a_row + d]);
            for (int w = 0; w < 8; w++) {
                __m256 column = _mm256_loadu_ps(b + d * b_row + 8 * w);
#ifdef __FMA__
                sum[w] = _mm256_fmadd_ps(factor, column, sum[w]);
#else
                sum[w] = _mm256_add_ps(_mm256_mul_ps(factor, column), sum[w]);
#endif
            }
        }
        for (int w = 0; w < 8; w++) _mm256_storeu_ps(c + r * c_row + 8 * w, sum[w]);
    }
}

#define __m512 Numbers
#define __m512i Wholes
#define __mmask16 uint16_t
#define _mm512_setzero_ps() all(0)
#define _mm512_set1_ps(x) all(x)
#define _mm512_set1_epi32(x) ((Wholes){0} + (int32_t)(x))
#define _mm512_setr_epi32(...) ((Wholes){__VA_ARGS__})
#define _mm512_loadu_ps(from) read16(from, 0xffff)
#define _mm512_maskz_loadu_ps(mask, from) read16(from, mask)
#define _mm512_maskz_loadu_epi32(mask, from) ((Wholes)read16(from, mask))
#define _mm512_storeu_ps(to, x) write16((float *)(to), 0xffff, x)
#define _mm512_storeu_si512(to, x) write16((float *)(to), 0xffff, (Numbers)(x))
#define _mm512_mask_storeu_ps(to, mask, x) write16(to, mask, x)
#define _mm512_add_ps(a, b) ((a) + (b))
#define _mm512_sub_ps(a, b) ((a) - (b))
#define _mm512_mul_ps(a, b) ((a) * (b))
#define _mm512_div_ps(a, b) ((a) / (b))
#define _mm512_fmadd_ps(a, b, c) ((a) * (b) + (c))
#define _mm512_fnmadd_ps(a, b, c) ((c) - (a) * (b))
#define _mm512_sqrt_ps(x) root(x)
#define _mm512_add_epi32(a, b) ((a) + (b))
#define _mm512_reduce_add_ps(x) sum16(x)
#define _mm512_reduce_min_ps(x) least16(x)
#define _mm512_mask_reduce_min_epi32(mask, x) least_whole(mask, x)
#define LESS(a, b) ((a) < (b))
#define SAME(a, b) ((a) == (b))
#define _mm512_cmp_ps_mask(a, b, how) bits_of(how(a, b))
#undef _CMP_LT_OQ
#undef _CMP_EQ_OQ
#define _CMP_LT_OQ LESS
#define _CMP_EQ_OQ SAME
#define _mm512_mask_mov_ps(a, mask, b) choose(a, mask_of(mask), b)
#define _mm512_mask_mov_epi32(a, mask, b) ((Wholes)choose((Numbers)(a), mask_of(mask), (Numbers)(b)))
"""
