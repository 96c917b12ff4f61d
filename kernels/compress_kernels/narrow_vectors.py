"""Vectors of eight float32 or bfloat16 for C kernels: AVX2."""

from compress_kernels.activations_source import SOURCE as ACTIVATIONS
from compress_kernels.native_torch import SOURCE as SHARED

SOURCE = (
    r"""
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

typedef __m256 Vector;
INLINE Vector alike(float x) { return _mm256_set1_ps(x); }
INLINE Vector fused(Vector a, Vector b, Vector c) { return _mm256_fmadd_ps(a, b, c); }
INLINE Vector larger(Vector a, Vector b) { return _mm256_max_ps(a, b); } /* b where one is NaN, as in `smaller` */
INLINE Vector smaller(Vector a, Vector b) { return _mm256_min_ps(a, b); }
INLINE Vector size_of(Vector x) { return _mm256_andnot_ps(_mm256_set1_ps(-0.f), x); }
INLINE Vector nearest(Vector x) { return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
INLINE Vector scaled(Vector x, Vector power) { /* x 2^power, for powers of ordinary numbers */
  __m256i exponent = _mm256_add_epi32(_mm256_cvtps_epi32(power), _mm256_set1_epi32(127));
  return x * _mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23));
}
INLINE Vector pick(const float *table, Vector last) { /* of 16, by the last bits */
  __m256i index = _mm256_castps_si256(last);
  __m256 low = _mm256_permutevar8x32_ps(_mm256_load_ps(table), index);
  __m256 high = _mm256_permutevar8x32_ps(_mm256_load_ps(table + 8), index);
  return _mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32(index, 28)));
}
"""
    + ACTIVATIONS
)
