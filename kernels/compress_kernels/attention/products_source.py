"""The C source of small matrix products in registers, of float32 or of bfloat16 pairs, for attention."""

SOURCE = r"""
#define ROWS 6 /* rows of a tile: 6 x 4 accumulators */

INLINE int64_t up(int64_t value, int64_t step) { return parts(value, step) * step; }

/* 32 numbers rounded to bfloat16, in their order. */
INLINE __m512i halves(__m512 low, __m512 high) {
#ifdef __AVX512BF16__
    return (__m512i)_mm512_cvtne2ps_pbh(high, low);
#else
    return _mm512_castps_si512(low); /* never asked for: `takes_half` */
#endif
}
INLINE __m512 multiply(__m512 sum, __m512 a, __m512 b, const int half) {
#ifdef __AVX512BF16__
    if (half) return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b);
#endif
    return _mm512_fmadd_ps(a, b, sum);
}

/* c[rows, 16 * wide] = ((c +) a[rows, depth] b[depth, 16 * wide]) * scale; rows, wide and half are constants here */
INLINE void tile(
    const float *a, int64_t a_row, const float *b, int64_t b_row, float *c, int64_t c_row, int64_t depth,
    float scale, const int rows, const int wide, int add, const int half)
{
    __m512 sum[ROWS][4];
    for (int r = 0; r < rows; r++)
        for (int w = 0; w < wide; w++) sum[r][w] = add ? _mm512_loadu_ps(c + r * c_row + 16 * w) : _mm512_setzero_ps();
    for (int64_t d = 0; d < depth; d++) {
        __m512 column[4];
        for (int w = 0; w < wide; w++) column[w] = _mm512_loadu_ps(b + d * b_row + 16 * w);
        for (int r = 0; r < rows; r++) {
            __m512 factor = _mm512_set1_ps(a[r * a_row + d]);
            for (int w = 0; w < wide; w++) sum[r][w] = multiply(sum[r][w], factor, column[w], half);
        }
    }
    for (int r = 0; r < rows; r++)
        for (int w = 0; w < wide; w++)
            _mm512_storeu_ps(c + r * c_row + 16 * w, _mm512_mul_ps(sum[r][w], _mm512_set1_ps(scale)));
}

#define WIDE(rows) \
    switch (wide) { \
    case 4: tile(a, a_row, b, b_row, c, c_row, depth, scale, rows, 4, add, half); break; \
    case 3: tile(a, a_row, b, b_row, c, c_row, depth, scale, rows, 3, add, half); break; \
    case 2: tile(a, a_row, b, b_row, c, c_row, depth, scale, rows, 2, add, half); break; \
    default: tile(a, a_row, b, b_row, c, c_row, depth, scale, rows, 1, add, half); }

INLINE void products(const float *a, int64_t a_row, const float *b, int64_t b_row, float *c, int64_t c_row,
                     int64_t rows, int64_t depth, float scale, int wide, int add, const int half)
{
    for (; rows >= ROWS; rows -= ROWS, a += ROWS * a_row, c += ROWS * c_row) { WIDE(6) }
    switch (rows) {
    case 5: WIDE(5) break;
    case 4: WIDE(4) break;
    case 3: WIDE(3) break;
    case 2: WIDE(2) break;
    case 1: WIDE(1) break; }
}
static void product(const float *a, int64_t a_row, const float *b, int64_t b_row, float *c, int64_t c_row,
                    int64_t rows, int64_t depth, float scale, int wide, int add, int half)
{
    if (half) products(a, a_row, b, b_row, c, c_row, rows, depth, scale, wide, add, 1);
    else products(a, a_row, b, b_row, c, c_row, rows, depth, scale, wide, add, 0);
}
"""
