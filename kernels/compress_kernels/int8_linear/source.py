"""int8_linear in C for CPUs with AVX512-VNNI.

A block of rows is quantized into the cache, then multiplied by 64 outputs at a time, whose weights are laid out anew in
every call: that costs a twentieth of 128 rows, and no second copy of the weights is ever kept. Few rows are multiplied
along the weights' own rows. All sums are exact and every float step is one rounding, so torch's path gives the same.
"""

from compress_kernels.int8_linear.rows_source import ROWS

SOURCE = (
    ROWS
    + r"""
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
  const uint8_t *codes = rows.codes + i * j->stride;
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
static void lay_out(int64_t begin, int64_t end, void *job) {
  const Job *j = job;
  for (int64_t p = begin; p < end; ++p) pack(j, p * PANEL, (Panel *)(j->panels + p * panel_bytes(j)));
}
static Job rows_from(const Job *j, int64_t first) { /* the job whose first row is that one */
  Job later = *j;
  int64_t bytes = first * (j->x.half ? 2 : 4);
  later.x.data = (const char *)j->x.data + bytes * j->depth, later.out = (char *)j->out + bytes * j->width;
  return later;
}
/* The first rows times the panels of a range; their weights are laid out before, or now in `own`. */
static void multiply(const Job *j, int64_t count, int64_t from, int64_t to, Panel *own) {
  Rows rows = quantize(j, count);
  int64_t step = own ? j->depth * PANEL : panel_bytes(j), share = parts(step, parts(count, TILE));
  int64_t row = j->depth * (j->x.half ? 2 : 4), portion = parts(count * row, parts(count, TILE) * (to - from));
  const char *ahead = (const char *)j->x.data + count * row; /* of the next rows */
  for (int64_t p = from; p < to; ++p) {
    const Panel *panel = own ? own : (const Panel *)(j->panels + p * step);
    const int8_t *soon = (own ? j->weight : j->panels) + (p + 1) * step; /* of the next panel */
    int64_t i = 0, n = p * PANEL;
    if (own) pack(j, n, own);
    for (; i + TILE <= count; i += TILE, soon += share, ahead += portion) {
      for (int64_t at = 0; at < share; at += 64) _mm_prefetch(soon + at, _MM_HINT_T0);
      for (int64_t at = 0; at < portion && !own; at += 64) _mm_prefetch(ahead + at, _MM_HINT_T0);
      tile(6, j, panel, rows, i, n);
    }
    switch (count - i) {
      case 5: tile(5, j, panel, rows, i, n); break;
      case 4: tile(4, j, panel, rows, i, n); break;
      case 3: tile(3, j, panel, rows, i, n); break;
      case 2: tile(2, j, panel, rows, i, n); break;
      case 1: tile(1, j, panel, rows, i, n); break;
    }
  }
  free(rows.codes);
}
static void many(int64_t begin, int64_t end, void *job) {
  const Job *j = job;
  int64_t blocks = parts(j->rows, j->block), panels = parts(j->width, PANEL);
  Panel *own = j->panels ? NULL : aligned_alloc(64, panel_bytes(j));
  for (int64_t task = begin; task < end; ++task) {
    int64_t first = task % blocks * j->block, from = task / blocks * j->columns;
    Job part = rows_from(j, first);
    multiply(&part, least(j->block, j->rows - first), from, least(from + j->columns, panels), own);
  }
  free(own);
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
  __m512 total[4];
  const int8_t *w[4];
  const uint8_t *codes = rows.codes + i * j->stride;
  int64_t left = j->width - n, stride = j->stride, depth = j->depth, k = 0;
  for (int q = 0; q < 4; ++q) w[q] = j->weight + (n + (q < left ? q : 0)) * depth;
  for (int64_t g = 0; g < j->groups; ++g) {
    __m512i sum[4][4], own[4], v[4], ones = _mm512_set1_epi8(1);
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
static void few(int64_t begin, int64_t end, void *job) {
  const Job *j = job;
  Rows rows = quantize(j, j->rows);
  for (int64_t n = begin * 4; n < end * 4 && n < j->width; n += 4) {
    int64_t i = 0;
    for (; i + 4 <= j->rows; i += 4) strip(4, j, rows, i, n);
    switch (j->rows - i) {
      case 3: strip(3, j, rows, i, n); break;
      case 2: strip(2, j, rows, i, n); break;
      case 1: strip(1, j, rows, i, n); break;
    }
  }
  free(rows.codes);
}

static void prepare(Job *j, int64_t group) {
  j->stride = parts(j->depth, 64) * 64, j->panels = NULL;
  j->group = group ? group : j->stride, j->groups = parts(j->depth, j->group);
}
static void lay_out_all(Job *j) {
  int64_t panels = parts(j->width, PANEL);
  j->panels = aligned_alloc(64, panels * panel_bytes(j));
  spread(panels, 8 * PANEL * j->depth, lay_out, j);
}
static void linear(Job j) {
  if (j.rows <= FEW) { spread(parts(j.width, 4), 4 * j.depth * (j.rows + 3), few, &j); return; }
  int64_t workers = threads();
  j.block = parts(parts(j.rows, workers), TILE) * TILE;
  if (j.block * j.stride > NEAR) j.block = BLOCK;
  if (j.block < 4 * TILE) j.block = 4 * TILE;
  int64_t panels = parts(j.width, PANEL), blocks = parts(j.rows, j.block), groups = 1;
  while (blocks * groups < workers && groups < panels) ++groups;
  j.columns = parts(panels, groups), groups = parts(panels, j.columns);
  if (blocks > 1) lay_out_all(&j); /* else each task lays out its own */
  spread(blocks * groups, j.block * j.depth * j.columns * PANEL, many, &j);
  free(j.panels);
}
"""
)

OPERATOR = r"""
static void operator(Value *stack, uint64_t inputs, uint64_t outputs) {
  Job j; Floats scale;
  Tensor x = (Tensor)stack[0], weight = (Tensor)stack[1], zero = optional(stack[6]);
  int64_t dims, shape[16];
  int known = floats(x, &j.x) & floats((Tensor)stack[2], &j.weight_scale) & floats(optional(stack[3]), &j.bias)
            & floats(optional(stack[4]), &j.factor) & floats(optional(stack[5]), &scale);
  aoti_torch_get_dim(x, &dims);
  int64_t depth = sizes(weight)[1], group = (int64_t)stack[8];
  if (!known || !whole(weight) || dims > 16 || depth > DEEPEST || !dims || sizes(x)[dims - 1] != depth || group % 64) {
    hand_over("compress::int8_linear_plain", stack);
    return;
  }
  j.width = sizes(weight)[0], j.depth = depth, j.rows = 1;
  for (int64_t d = 0; d < dims - 1; ++d) shape[d] = sizes(x)[d], j.rows *= shape[d];
  shape[dims - 1] = j.width;
  Tensor out = empty(dims, shape, j.x.half);
  float fixed = scale.data ? _mm512_cvtss_f32(load(scale, 0, 1)) : 0;
  int32_t middle = 128;
  j.activation = (int64_t)stack[7];
  j.weight = address(weight), j.out = address(out);
  j.scale = scale.data ? &fixed : NULL, j.zero = zero ? address(zero) : &middle;
  prepare(&j, group);
  if (j.rows && j.width) linear(j);
  release(stack, 3, 4);
  stack[0] = (Value)out;
}
int32_t install(const char *name) { return implement(name, operator); }
"""
