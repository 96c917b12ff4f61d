"""Vectors of eight float32 or bfloat16 for C kernels, and activations of them: AVX2."""

from compress_kernels.native_torch import SOURCE as SHARED

SOURCE = (
    r"""
#include <string.h>
#if !defined(__AVX2__) || !defined(__FMA__)
#error this processor has no AVX2
#endif
"""
    + SHARED
    + r"""
INLINE __m256 load(Floats from, int64_t at, int64_t count) { /* where fewer than 8 are left, zeros behind them */
  if (!from.half) {
    const float *data = (const float *)from.data + at;
    if (count >= 8) return _mm256_loadu_ps(data);
    float held[8] = {0};
    for (int64_t i = 0; i < count; ++i) held[i] = data[i];
    return _mm256_loadu_ps(held);
  }
  const uint16_t *data = (const uint16_t *)from.data + at;
  uint16_t held[8] = {0};
  for (int64_t i = 0; count < 8 && i < count; ++i) held[i] = data[i];
  __m128i half = _mm_loadu_si128((const __m128i *)(count < 8 ? held : data));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
}
INLINE void store(void *to, int64_t half, int64_t at, __m256 v, int64_t count) {
  if (!half) {
    float *data = (float *)to + at, held[8];
    if (count >= 8) { _mm256_storeu_ps(data, v); return; }
    _mm256_storeu_ps(held, v);
    for (int64_t i = 0; i < count; ++i) data[i] = held[i];
    return;
  }
  uint16_t *data = (uint16_t *)to + at, held[8];
  __m256i bits = _mm256_castps_si256(v), odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  bits = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff))); /* to nearest, ties to even */
  __m256 nan = _mm256_castsi256_ps(_mm256_set1_epi32(0x7fc00000));
  bits = _mm256_castps_si256(_mm256_blendv_ps(_mm256_castsi256_ps(bits), nan, _mm256_cmp_ps(v, v, _CMP_UNORD_Q)));
  bits = _mm256_srli_epi32(bits, 16);
  __m128i words = _mm_packus_epi32(_mm256_castsi256_si128(bits), _mm256_extracti128_si256(bits, 1));
  if (count >= 8) { _mm_storeu_si128((__m128i *)data, words); return; }
  _mm_storeu_si128((__m128i *)held, words);
  for (int64_t i = 0; i < count; ++i) data[i] = held[i];
}

/* ---- activations ---- */
INLINE __m256 polynomial(__m256 x, const float *terms, int count) { /* highest power first */
  __m256 p = _mm256_set1_ps(terms[0]);
  for (int i = 1; i < count; ++i) p = _mm256_fmadd_ps(p, x, _mm256_set1_ps(terms[i]));
  return p;
}
INLINE __m256 power_of_2(__m256 x) { /* within 2e-7; NaN stays NaN */
  x = _mm256_max_ps(_mm256_set1_ps(-126), _mm256_min_ps(_mm256_set1_ps(126), x));
  __m256 whole = _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  __m256 scale = _mm256_castsi256_ps(_mm256_slli_epi32(
    _mm256_add_epi32(_mm256_cvtps_epi32(whole), _mm256_set1_epi32(127)), 23));
  return _mm256_mul_ps(polynomial(_mm256_sub_ps(x, whole), powers, 6), scale);
}
INLINE __m256 sigmoid_of(__m256 x, __m256 v) { /* v / (1 + e^-x) */
  __m256 power = power_of_2(_mm256_mul_ps(x, _mm256_set1_ps(-1.44269504f)));
  return _mm256_div_ps(v, _mm256_add_ps(_mm256_set1_ps(1), power));
}
INLINE __m256 pick(const float *table, __m256i index) { /* of 16 */
  __m256 low = _mm256_permutevar8x32_ps(_mm256_load_ps(table), index);
  __m256 high = _mm256_permutevar8x32_ps(_mm256_load_ps(table + 8), index);
  return _mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32(index, 28)));
}
INLINE __m256 gelu(__m256 v) { /* within 5e-7 */
  __m256 size = _mm256_andnot_ps(_mm256_set1_ps(-0.f), v);
  __m256 at = _mm256_min_ps(_mm256_set1_ps(15.49f), _mm256_mul_ps(size, _mm256_set1_ps(1 / .36f)));
  __m256 piece = _mm256_add_ps(at, _mm256_set1_ps(12582912)); /* its last bits are the nearest whole number */
  __m256 off = _mm256_sub_ps(at, _mm256_sub_ps(piece, _mm256_set1_ps(12582912)));
  __m256i index = _mm256_castps_si256(piece);
  __m256 tail = pick(tails, index);
  for (int i = 1; i < 5; ++i) tail = _mm256_fmadd_ps(tail, off, pick(tails + 16 * i, index));
  return _mm256_sub_ps(_mm256_max_ps(_mm256_setzero_ps(), v), tail);
}
INLINE __m256 gelu_tanh(__m256 v) {
  __m256 cubed = _mm256_fmadd_ps(_mm256_mul_ps(v, v), _mm256_set1_ps(.044715f), _mm256_set1_ps(1));
  return sigmoid_of(_mm256_mul_ps(_mm256_mul_ps(v, cubed), _mm256_set1_ps(1.59576912f)), v);
}
static __attribute__((noinline)) void activate(int64_t kind, __m256 *v, int count) {
  for (int i = 0; kind == RELU && i < count; ++i) v[i] = _mm256_max_ps(_mm256_setzero_ps(), v[i]);
  for (int i = 0; kind == GELU && i < count; ++i) v[i] = gelu(v[i]);
  for (int i = 0; kind == GELU_TANH && i < count; ++i) v[i] = gelu_tanh(v[i]);
  for (int i = 0; kind == SILU && i < count; ++i) v[i] = sigmoid_of(v[i], v[i]);
}
"""
)
