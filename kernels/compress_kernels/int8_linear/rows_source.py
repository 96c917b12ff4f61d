"""The part of int8_linear in C that all of its users share: what a call is given, and how it quantizes its input."""

ROWS = r"""
enum { PANEL = 64, TILE = 6, FEW = 8, BLOCK = 60, NEAR = 400 << 10, DEEPEST = 65536 };
typedef struct {
  Floats x, weight_scale, bias, factor;
  const int8_t *weight;
  void *out;
  int64_t rows, depth, width, activation;
  const float *scale; const int32_t *zero; /* of all activations, or NULL: found for each group of inputs of a row */
  int64_t group, groups; /* inputs of a group, a multiple of 64; groups of a row */
  int64_t stride, block, columns; /* bytes of a row of codes; rows and panels of a task */
  int8_t *panels;
} Job;
typedef struct { uint8_t *codes; float *scale; int32_t *zero; } Rows; /* and what undoes the codes of each group */

/* As instructions: compilers spill the sums of the intrinsic. */
#define DOT(sum, codes, weights) __asm__("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(codes), "v"(weights))


/* ---- activations: u8 codes, and for each group of inputs of a row a scale and a zero point ---- */
INLINE void range(const Job *j, int64_t row, int64_t from, int64_t to, float *values, float *low, float *high) {
  __m512 lo[4], hi[4]; __mmask16 broken = 0;
  for (int q = 0; q < 4; ++q) lo[q] = hi[q] = _mm512_setzero_ps();
  for (int64_t k = from; k < to; k += 64)
    for (int q = 0; q < 4; ++q) {
      int64_t at = k + 16 * q; __mmask16 mask = head16(j->depth - at);
      __m512 v = load(j->x, row * j->depth + at, mask);
      if (j->factor.data) v = _mm512_mul_ps(v, load(j->factor, at, mask));
      _mm512_store_ps(values + at, v);
      lo[q] = _mm512_min_ps(lo[q], v), hi[q] = _mm512_max_ps(hi[q], v);
      broken |= _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    }
  *low = _mm512_reduce_min_ps(_mm512_min_ps(_mm512_min_ps(lo[0], lo[1]), _mm512_min_ps(lo[2], lo[3])));
  *high = broken ? NAN : _mm512_reduce_max_ps(_mm512_max_ps(_mm512_max_ps(hi[0], hi[1]), _mm512_max_ps(hi[2], hi[3])));
}
INLINE void encode(const float *values, int64_t from, int64_t to, float inverse, int32_t zero, int cut, uint8_t *out) {
  const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  __m512 inverses = _mm512_set1_ps(inverse), most = _mm512_set1_ps(65536);
  __m512i zeros = _mm512_set1_epi32(zero);
  for (int64_t k = from; k < to; k += 64) {
    __m512i code[4];
    for (int q = 0; q < 4; ++q) {
      __m512 v = _mm512_mul_ps(_mm512_load_ps(values + k + 16 * q), inverses);
      if (cut) v = _mm512_min_ps(v, most);
      code[q] = _mm512_add_epi32(_mm512_cvtps_epi32(v), zeros);
    }
    __m512i words = _mm512_packs_epi32(code[0], code[1]), more = _mm512_packs_epi32(code[2], code[3]);
    _mm512_store_si512(out + k, _mm512_permutexvar_epi32(order, _mm512_packus_epi16(words, more)));
  }
}
static Rows quantize(const Job *j, int64_t count) {
  Rows r;
  int64_t all = count * j->groups;
  r.codes = aligned_alloc(64, count * j->stride + (all * 8 + 63) / 64 * 64 + j->stride * 4);
  float *values = (float *)(r.codes + count * j->stride);
  r.scale = values + j->stride, r.zero = (int32_t *)(r.scale + all);
  for (int64_t n = 0; n < all; ++n) {
    int64_t row = n / j->groups, from = n % j->groups * j->group, to = least(from + j->group, j->stride);
    float low, high, scale, inverse; int32_t zero;
    range(j, row, from, to, values, &low, &high);
    float width = high - low;
    int finite = width <= 3.4028234e38f, usable = finite && width > 1e-30f;
    if (j->scale) scale = *j->scale, inverse = 1 / scale, zero = *j->zero;
    else {
      scale = usable ? width / 255 : 0, inverse = usable ? 1 / scale : 0;
      zero = usable ? (int32_t)nearbyintf(-low * inverse) : 0;
    }
    r.scale[n] = finite ? scale : NAN, r.zero[n] = zero;
    encode(values, from, to, inverse, zero, j->scale != NULL, r.codes + row * j->stride);
  }
  return r;
}
"""
