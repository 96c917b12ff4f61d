"""What int8_linear in C asks of the processor, for those with AVX512-VNNI: codes in bytes, products four at a time."""

SOURCE = r"""
enum { PANEL = 64, TILE = 6, STRIP = 4 };
typedef uint8_t Code;

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
INLINE void encode(const float *values, int64_t from, int64_t to, float inverse, int32_t zero, int cut, Code *out) {
  const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  __m512 inverses = _mm512_set1_ps(inverse), most = _mm512_set1_ps(65536);
  __m512i zeros = _mm512_set1_epi32(zero);
  for (int64_t k = from; k < to; k += 64) {
    __m512i code[4];
    for (int q = 0; q < 4; ++q) {
      __m512 v = _mm512_mul_ps(_mm512_load_ps(values + k + 16 * q), inverses);
      if (cut) v = _mm512_max_ps(_mm512_set1_ps(-65536), _mm512_min_ps(v, most));
      code[q] = _mm512_add_epi32(_mm512_cvtps_epi32(v), zeros);
    }
    __m512i words = _mm512_packs_epi32(code[0], code[1]), more = _mm512_packs_epi32(code[2], code[3]);
    _mm512_store_si512(out + k, _mm512_permutexvar_epi32(order, _mm512_packus_epi16(words, more)));
  }
}

/* ---- many rows: 64 outputs at a time, their weights laid out as [depth / 4][64][4], sums of groups behind ---- */
typedef struct {
  __m512 scale[4], bias[4]; __mmask16 mask[4];
  int8_t weight[] __attribute__((aligned(64)));
} Panel;
static int64_t panel_bytes(const Job *j) { return sizeof(Panel) + (j->stride + j->groups * 4) * PANEL; }
INLINE __m512i *sums_of(const Job *j, const Panel *p) { return (__m512i *)(p->weight + j->stride * PANEL); }

static void pack(const Job *j, int64_t n, Panel *to) {
  __m512i ones = _mm512_set1_epi8(1), *sums = sums_of(j, to);
  for (int q = 0; q < 4; ++q) {
    int64_t start = n + 16 * q, left = j->width - start;
    for (int64_t g = 0; g < j->groups; ++g) sums[4 * g + q] = _mm512_setzero_si512();
    for (int64_t k = 0; k < j->depth; k += 64) {
      __mmask64 mask = head64(j->depth - k);
      __m512i r[16], sum = sums[k / j->group * 4 + q];
      for (int i = 0; i < 16; ++i) {
        const int8_t *from = j->weight + (start + i) * j->depth + k;
        _mm_prefetch(from + 128, _MM_HINT_T0);
        r[i] = _mm512_maskz_loadu_epi8(i < left ? mask : 0, from);
      }
      transpose(r);
      for (int i = 0; i < 16; ++i) {
        _mm512_store_si512(to->weight + (k / 4 + i) * 256 + 64 * q, r[i]);
        DOT(sum, ones, r[i]);
      }
      sums[k / j->group * 4 + q] = sum;
    }
    to->mask[q] = head16(left);
    to->scale[q] = load(j->weight_scale, start, to->mask[q]);
    to->bias[q] = j->bias.data ? load(j->bias, start, to->mask[q]) : _mm512_set1_ps(-0.f);
  }
}
INLINE __m512 undo(__m512i sum, __m512i weights, int32_t zero, float scale) { /* one group's part of the product */
  sum = _mm512_sub_epi32(sum, _mm512_mullo_epi32(_mm512_set1_epi32(zero), weights));
  return _mm512_mul_ps(_mm512_cvtepi32_ps(sum), _mm512_set1_ps(scale));
}
INLINE void tile(const int R, const Job *j, const Panel *p, Rows rows, int64_t i, int64_t n) {
  __m512i sum[TILE][4];
  __m512 total[TILE][4];
  const Code *codes = (const Code *)rows.codes + i * j->stride;
  int64_t steps = parts(j->depth, 4), stride = j->stride, k = 0;
  for (int64_t g = 0; g < j->groups; ++g) {
    #pragma GCC unroll 6
    for (int r = 0; r < R; ++r)
      #pragma GCC unroll 4
      for (int q = 0; q < 4; ++q) sum[r][q] = _mm512_setzero_si512();
    for (int64_t last = least(k + j->group / 4, steps); k < last; ++k) {
      const __m512i *w = (const __m512i *)(p->weight + k * 256);
      __m512i w0 = w[0], w1 = w[1], w2 = w[2], w3 = w[3];
      #pragma GCC unroll 6
      for (int r = 0; r < R; ++r) {
        __m512i a = _mm512_set1_epi32(*(const int32_t *)(codes + r * stride + 4 * k));
        DOT(sum[r][0], a, w0); DOT(sum[r][1], a, w1); DOT(sum[r][2], a, w2); DOT(sum[r][3], a, w3);
      }
    }
    #pragma GCC unroll 6
    for (int r = 0; r < R; ++r) {
      int64_t own = (i + r) * j->groups + g;
      #pragma GCC unroll 4
      for (int q = 0; q < 4; ++q) {
        __m512 part = undo(sum[r][q], sums_of(j, p)[4 * g + q], rows.zero[own], rows.scale[own]);
        total[r][q] = g ? _mm512_add_ps(total[r][q], part) : part;
      }
    }
  }
  #pragma GCC unroll 6
  for (int r = 0; r < R; ++r) {
    __m512 v[4];
    #pragma GCC unroll 4
    for (int q = 0; q < 4; ++q) v[q] = _mm512_add_ps(_mm512_mul_ps(total[r][q], p->scale[q]), p->bias[q]);
    if (j->activation) activate(j->activation, v, 4);
    #pragma GCC unroll 4
    for (int q = 0; q < 4; ++q) store(j->out, j->x.half, (i + r) * j->width + n + 16 * q, v[q], p->mask[q]);
  }
}

/* ---- few rows: products along the weights' own rows, 4 outputs at a time ---- */
INLINE __m512i across(const __m512i s[4]) { /* the sum of each */
  __m512i ab = _mm512_add_epi32(_mm512_unpacklo_epi32(s[0], s[1]), _mm512_unpackhi_epi32(s[0], s[1]));
  __m512i cd = _mm512_add_epi32(_mm512_unpacklo_epi32(s[2], s[3]), _mm512_unpackhi_epi32(s[2], s[3]));
  __m512i all = _mm512_add_epi32(_mm512_unpacklo_epi64(ab, cd), _mm512_unpackhi_epi64(ab, cd));
  __m256i half = _mm256_add_epi32(_mm512_castsi512_si256(all), _mm512_extracti64x4_epi64(all, 1));
  return _mm512_castsi128_si512(_mm_add_epi32(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1)));
}
INLINE void strip(const int R, const Job *j, Rows rows, int64_t i, int64_t n) {
  __m512 total[STRIP];
  const int8_t *w[4];
  const Code *codes = (const Code *)rows.codes + i * j->stride;
  int64_t left = j->width - n, stride = j->stride, depth = j->depth, k = 0;
  for (int q = 0; q < 4; ++q) w[q] = j->weight + (n + (q < left ? q : 0)) * depth;
  for (int64_t g = 0; g < j->groups; ++g) {
    __m512i sum[STRIP][4], own[4], v[4], ones = _mm512_set1_epi8(1);
    #pragma GCC unroll 4
    for (int q = 0; q < 4; ++q) {
      own[q] = _mm512_setzero_si512();
      #pragma GCC unroll 4
      for (int r = 0; r < R; ++r) sum[r][q] = _mm512_setzero_si512();
    }
    for (int64_t last = least(k + j->group, depth); k < last; k += 64) {
      __mmask64 mask = head64(depth - k);
      #pragma GCC unroll 4
      for (int q = 0; q < 4; ++q) {
        _mm_prefetch(w[q] + 8 * depth + k, _MM_HINT_T0); /* of the outputs after the next */
        v[q] = _mm512_maskz_loadu_epi8(mask, w[q] + k);
        DOT(own[q], ones, v[q]);
      }
      #pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        __m512i a = _mm512_load_si512(codes + r * stride + k);
        #pragma GCC unroll 4
        for (int q = 0; q < 4; ++q) DOT(sum[r][q], a, v[q]);
      }
    }
    __m512i weights = across(own);
    #pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      int64_t at = (i + r) * j->groups + g;
      __m512 part = undo(across(sum[r]), weights, rows.zero[at], rows.scale[at]);
      total[r] = g ? _mm512_add_ps(total[r], part) : part;
    }
  }
  __mmask16 mask = head16(left < 4 ? left : 4);
  __m512 scale = load(j->weight_scale, n, mask), bias = j->bias.data ? load(j->bias, n, mask) : _mm512_set1_ps(-0.f);
  #pragma GCC unroll 4
  for (int r = 0; r < R; ++r) {
    __m512 v = _mm512_add_ps(_mm512_mul_ps(total[r], scale), bias);
    if (j->activation) activate(j->activation, &v, 1);
    store(j->out, j->x.half, (i + r) * j->width + n, v, mask);
  }
}
"""
