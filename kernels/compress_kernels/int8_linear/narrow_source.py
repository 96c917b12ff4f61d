"""What int8_linear in C asks of the processor, for those with AVX2 only: codes in words, products two at a time.

Bytes cannot be multiplied exactly there (sums of two products saturate), words can, at up to twice float32's rate. A
code is kept less its zero point, so that nothing is left to undo but the scale.
"""

SOURCE = r"""
enum { PANEL = 16, TILE = 6, STRIP = 2 };
typedef int16_t Code;

/* ---- activations: codes less the zero point, and for each group of inputs of a row a scale ---- */
INLINE float across_most(__m256 v) {
  __m128 most = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  most = _mm_max_ps(most, _mm_movehl_ps(most, most));
  return _mm_cvtss_f32(_mm_max_ss(most, _mm_movehdup_ps(most)));
}
INLINE void range(const Job *j, int64_t row, int64_t from, int64_t to, float *values, float *low, float *high) {
  __m256 down = _mm256_setzero_ps(), top = down, broken = down, turn = _mm256_set1_ps(-0.f);
  for (int64_t k = from; k < to; k += 8) {
    __m256 v = load(j->x, row * j->depth + k, j->depth - k);
    if (j->factor.data) v = _mm256_mul_ps(v, load(j->factor, k, j->depth - k));
    _mm256_store_ps(values + k, v);
    down = _mm256_max_ps(down, _mm256_xor_ps(v, turn)), top = _mm256_max_ps(top, v);
    broken = _mm256_or_ps(broken, _mm256_cmp_ps(v, v, _CMP_UNORD_Q));
  }
  *low = -across_most(down);
  *high = _mm256_movemask_ps(broken) ? NAN : across_most(top);
}
INLINE void encode(const float *values, int64_t from, int64_t to, float inverse, int32_t zero, int cut, Code *out) {
  __m256 inverses = _mm256_set1_ps(inverse), most = _mm256_set1_ps(65536);
  __m256i zeros = _mm256_set1_epi32(zero), last = _mm256_set1_epi32(255);
  for (int64_t k = from; k < to; k += 16) {
    __m256i code[2];
    for (int q = 0; q < 2; ++q) {
      __m256 v = _mm256_mul_ps(_mm256_load_ps(values + k + 8 * q), inverses);
      if (cut) v = _mm256_max_ps(_mm256_set1_ps(-65536), _mm256_min_ps(v, most));
      __m256i whole = _mm256_add_epi32(_mm256_cvtps_epi32(v), zeros);
      whole = _mm256_max_epi32(_mm256_setzero_si256(), _mm256_min_epi32(last, whole));
      code[q] = _mm256_sub_epi32(whole, zeros);
    }
    __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32(code[0], code[1]), 0xd8);
    _mm256_store_si256((__m256i *)(out + k), words);
  }
}

/* ---- many rows: 16 outputs at a time, their weights laid out as [depth / 2][16][2] ---- */
typedef struct {
  __m256 scale[2], bias[2];
  int16_t weight[] __attribute__((aligned(64)));
} Panel;
static int64_t panel_bytes(const Job *j) { return sizeof(Panel) + j->stride * PANEL * 2; }

INLINE __m128i load_weights(const int8_t *from, int64_t count) { /* zeros behind the first ones */
  if (count >= 16) return _mm_loadu_si128((const __m128i *)from);
  int8_t held[16] = {0};
  for (int64_t i = 0; i < count; ++i) held[i] = from[i];
  return _mm_loadu_si128((const __m128i *)held);
}
INLINE void transpose(__m128i r[8]) { /* of words */
  __m128i t[8], u[8];
  for (int i = 0; i < 8; i += 2)
    t[i] = _mm_unpacklo_epi16(r[i], r[i + 1]), t[i + 1] = _mm_unpackhi_epi16(r[i], r[i + 1]);
  for (int i = 0; i < 8; i += 4) {
    u[i] = _mm_unpacklo_epi32(t[i], t[i + 2]), u[i + 1] = _mm_unpackhi_epi32(t[i], t[i + 2]);
    u[i + 2] = _mm_unpacklo_epi32(t[i + 1], t[i + 3]), u[i + 3] = _mm_unpackhi_epi32(t[i + 1], t[i + 3]);
  }
  for (int i = 0; i < 4; ++i)
    r[2 * i] = _mm_unpacklo_epi64(u[i], u[i + 4]), r[2 * i + 1] = _mm_unpackhi_epi64(u[i], u[i + 4]);
}
static void pack(const Job *j, int64_t n, Panel *to) {
  for (int q = 0; q < 2; ++q) {
    int64_t start = n + 8 * q, left = j->width - start;
    for (int64_t k = 0; k < j->depth; k += 16) {
      __m128i r[8];
      for (int i = 0; i < 8; ++i)
        r[i] = load_weights(j->weight + (start + i) * j->depth + k, i < left ? j->depth - k : 0);
      transpose(r); /* two inputs of an output are a word as yet */
      for (int i = 0; i < 8; ++i)
        _mm256_store_si256((__m256i *)(to->weight + (k / 2 + i) * 32 + 16 * q), _mm256_cvtepi8_epi16(r[i]));
    }
    to->scale[q] = load(j->weight_scale, start, left);
    to->bias[q] = j->bias.data ? load(j->bias, start, left) : _mm256_set1_ps(-0.f);
  }
}
/* Two codes of a row times two weights of 16 outputs. As instructions: compilers spill the sums of the intrinsics. */
INLINE void dot(__m256i *low, __m256i *high, const Code *codes, __m256i w0, __m256i w1) {
  __m256i a, b;
  __asm__("vpbroadcastd %4, %2\n vpmaddwd %5, %2, %3\n vpaddd %3, %0, %0\n vpmaddwd %6, %2, %2\n vpaddd %2, %1, %1"
          : "+&x"(*low), "+&x"(*high), "=&x"(a), "=&x"(b) : "m"(*(const Code (*)[2])codes), "x"(w0), "x"(w1));
}
INLINE void tile(const int R, const Job *j, const Panel *p, Rows rows, int64_t i, int64_t n) {
  __m256i sum[TILE][2];
  __m256 total[TILE][2];
  const Code *codes = (const Code *)rows.codes + i * j->stride;
  int64_t steps = parts(j->depth, 2), stride = j->stride, k = 0;
  for (int64_t g = 0; g < j->groups; ++g) {
    #pragma GCC unroll 6
    for (int r = 0; r < R; ++r) sum[r][0] = sum[r][1] = _mm256_setzero_si256();
    for (int64_t last = least(k + j->group / 2, steps); k < last; ++k) {
      const __m256i *w = (const __m256i *)(p->weight + k * 32);
      __m256i w0 = w[0], w1 = w[1];
      #pragma GCC unroll 6
      for (int r = 0; r < R; ++r) dot(&sum[r][0], &sum[r][1], codes + r * stride + 2 * k, w0, w1);
    }
    #pragma GCC unroll 6
    for (int r = 0; r < R; ++r)
      for (int q = 0; q < 2; ++q) {
        __m256 scale = _mm256_set1_ps(rows.scale[(i + r) * j->groups + g]);
        __m256 part = _mm256_mul_ps(_mm256_cvtepi32_ps(sum[r][q]), scale);
        total[r][q] = g ? _mm256_add_ps(total[r][q], part) : part;
      }
  }
  #pragma GCC unroll 6
  for (int r = 0; r < R; ++r) {
    __m256 v[2];
    for (int q = 0; q < 2; ++q) v[q] = _mm256_add_ps(_mm256_mul_ps(total[r][q], p->scale[q]), p->bias[q]);
    if (j->activation) activate(j->activation, v, 2);
    for (int q = 0; q < 2; ++q)
      store(j->out, j->x.half, (i + r) * j->width + n + 8 * q, v[q], j->width - n - 8 * q);
  }
}

/* ---- few rows: products along the weights' own rows, 4 outputs at a time ---- */
INLINE __m128i across(const __m256i s[4]) { /* the sum of each */
  __m256i all = _mm256_hadd_epi32(_mm256_hadd_epi32(s[0], s[1]), _mm256_hadd_epi32(s[2], s[3]));
  return _mm_add_epi32(_mm256_castsi256_si128(all), _mm256_extracti128_si256(all, 1));
}
/* 16 products of each row with the weights of output q */
INLINE void add(const int R, __m256i sum[STRIP][4], int q, __m128i weights, const Code *codes, int64_t stride) {
  __m256i w = _mm256_cvtepi8_epi16(weights);
  #pragma GCC unroll 2
  for (int r = 0; r < R; ++r) {
    __m256i a = _mm256_load_si256((const __m256i *)(codes + r * stride));
    sum[r][q] = _mm256_add_epi32(sum[r][q], _mm256_madd_epi16(a, w));
  }
}
INLINE void strip(const int R, const Job *j, Rows rows, int64_t i, int64_t n) {
  __m128 total[STRIP];
  const int8_t *w[4];
  const Code *codes = (const Code *)rows.codes + i * j->stride;
  int64_t left = least(j->width - n, 4), stride = j->stride, depth = j->depth, k = 0;
  for (int q = 0; q < 4; ++q) w[q] = j->weight + (n + (q < left ? q : 0)) * depth;
  for (int64_t g = 0; g < j->groups; ++g) {
    __m256i sum[STRIP][4];
    for (int r = 0; r < R; ++r) for (int q = 0; q < 4; ++q) sum[r][q] = _mm256_setzero_si256();
    int64_t last = least(k + j->group, depth);
    for (; k + 64 <= last; k += 64)
      #pragma GCC unroll 4
      for (int q = 0; q < 4; ++q) {
        _mm_prefetch(w[q] + 8 * depth + k, _MM_HINT_T0); /* of the outputs after the next */
        #pragma GCC unroll 4
        for (int64_t at = k; at < k + 64; at += 16)
          add(R, sum, q, _mm_loadu_si128((const __m128i *)(w[q] + at)), codes + at, stride);
      }
    for (; k < last; k += 16)
      for (int q = 0; q < 4; ++q) add(R, sum, q, load_weights(w[q] + k, depth - k), codes + k, stride);
    for (int r = 0; r < R; ++r) {
      __m128 scale = _mm_set1_ps(rows.scale[(i + r) * j->groups + g]);
      __m128 part = _mm_mul_ps(_mm_cvtepi32_ps(across(sum[r])), scale);
      total[r] = g ? _mm_add_ps(total[r], part) : part;
    }
  }
  __m256 scale = load(j->weight_scale, n, left), bias = j->bias.data ? load(j->bias, n, left) : _mm256_set1_ps(-0.f);
  for (int r = 0; r < R; ++r) {
    __m256 v = _mm256_add_ps(_mm256_mul_ps(_mm256_castps128_ps256(total[r]), scale), bias);
    if (j->activation) activate(j->activation, &v, 1);
    store(j->out, j->x.half, (i + r) * j->width + n, v, left);
  }
}
"""
