"""Vectors of sixteen float32 or bfloat16 for C kernels: AVX-512."""

from compress_kernels.activations_source import SOURCE as ACTIVATIONS
from compress_kernels.native_torch import SOURCE as SHARED

SOURCE = (
    r"""
#if !defined(__AVX512VNNI__) || !defined(__AVX512VL__) || !defined(__AVX512BW__)
#error this processor has no AVX512-VNNI
#endif
"""
    + SHARED
    + r"""
INLINE __mmask16 head16(int64_t n) { return n >= 16 ? 0xffff : n <= 0 ? 0 : (1u << n) - 1; }
INLINE __mmask64 head64(int64_t n) { return n >= 64 ? ~0ull : n <= 0 ? 0 : (1ull << n) - 1; }
INLINE __m512 load(Floats from, int64_t at, __mmask16 mask) {
  if (!from.half) return _mm512_maskz_loadu_ps(mask, (const float *)from.data + at);
  __m256i half = _mm256_maskz_loadu_epi16(mask, (const uint16_t *)from.data + at);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}
INLINE void store(void *to, int64_t half, int64_t at, __m512 v, __mmask16 mask) {
  if (!half) { _mm512_mask_storeu_ps((float *)to + at, mask, v); return; }
  __m512i bits = _mm512_castps_si512(v), odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  bits = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff))); /* to nearest, ties to even */
  bits = _mm512_mask_mov_epi32(bits, _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q), _mm512_set1_epi32(0x7fc00000));
  _mm256_mask_storeu_epi16((uint16_t *)to + at, mask, _mm512_cvtepi32_epi16(_mm512_srli_epi32(bits, 16)));
}

INLINE void transpose(__m512i r[16]) {
  __m512i t[16];
  for (int i = 0; i < 16; i += 2)
    t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]), t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
  for (int i = 0; i < 16; i += 4) {
    r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]), r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]), r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
  for (int i = 0; i < 4; ++i) {
    __m512i a = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88), b = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
    __m512i c = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88), d = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
    t[i] = _mm512_shuffle_i32x4(a, c, 0x88), t[i + 8] = _mm512_shuffle_i32x4(a, c, 0xdd);
    t[i + 4] = _mm512_shuffle_i32x4(b, d, 0x88), t[i + 12] = _mm512_shuffle_i32x4(b, d, 0xdd);
  }
  for (int i = 0; i < 16; ++i) r[i] = t[i];
}

typedef __m512 Vector;
INLINE Vector alike(float x) { return _mm512_set1_ps(x); }
INLINE Vector fused(Vector a, Vector b, Vector c) { return _mm512_fmadd_ps(a, b, c); }
INLINE Vector larger(Vector a, Vector b) { return _mm512_max_ps(a, b); } /* b where one is NaN, as in `smaller` */
INLINE Vector smaller(Vector a, Vector b) { return _mm512_min_ps(a, b); }
INLINE Vector size_of(Vector x) { return _mm512_abs_ps(x); }
INLINE Vector nearest(Vector x) {
  return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
INLINE Vector scaled(Vector x, Vector power) { return _mm512_scalef_ps(x, power); } /* x 2^power */
INLINE Vector pick(const float *table, Vector last) { /* of 16, by the last bits */
  return _mm512_permutexvar_ps(_mm512_castps_si512(last), _mm512_load_ps(table));
}
"""
    + ACTIVATIONS
)
