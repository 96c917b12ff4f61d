"""int8_linear in C for CPUs with AVX512-VNNI.

A block of rows is quantized into the cache, then multiplied by 64 outputs at a time, whose weights are laid out anew in
every call: that costs a twentieth of 128 rows, and no second copy of the weights is ever kept. Few rows are multiplied
along the weights' own rows. All sums are exact and every float step is one rounding, so torch's path gives the same.
"""

SOURCE = r"""
enum { PANEL = 64, TILE = 6, FEW = 8, BLOCK = 60, NEAR = 400 << 10, DEEPEST = 65536 };
typedef struct {
  Floats x, weight_scale, bias, factor;
  const int8_t *weight;
  void *out;
  int64_t rows, depth, width, activation;
  const float *scale; const int32_t *zero; /* of all activations, or NULL: found for each row */
  int64_t stride, block, columns; /* bytes of a row of codes; rows and panels of a task */
  int8_t *panels;
} Job;
typedef struct { uint8_t *codes; float *scale; int32_t *zero; float *values; } Rows; /* and what undoes the codes */

/* As instructions: compilers spill the sums of the intrinsic. */
#define DOT(sum, codes, weights) __asm__("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(codes), "v"(weights))

/* ---- activations: u8 codes, a scale and a zero point a row ---- */
INLINE void range(const Job *j, int64_t row, float *values, float *low, float *high) {
  __m512 lo[4], hi[4]; __mmask16 broken = 0;
  for (int q = 0; q < 4; ++q) lo[q] = hi[q] = _mm512_setzero_ps();
  for (int64_t k = 0; k < j->stride; k += 64)
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
static Rows quantize(const Job *j, int64_t first, int64_t count) {
  Rows r;
  r.codes = aligned_alloc(64, count * j->stride + (count * 8 + 63) / 64 * 64 + j->stride * 4);
  r.values = (float *)(r.codes + count * j->stride);
  r.scale = r.values + j->stride, r.zero = (int32_t *)(r.scale + count);
  const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  for (int64_t i = 0; i < count; ++i) {
    float low, high, scale, inverse; int32_t zero;
    range(j, first + i, r.values, &low, &high);
    float width = high - low;
    int finite = width <= 3.4028234e38f, usable = finite && width > 1e-30f;
    if (j->scale) scale = *j->scale, inverse = 1 / scale, zero = *j->zero;
    else {
      scale = usable ? width / 255 : 0, inverse = usable ? 1 / scale : 0;
      zero = usable ? (int32_t)nearbyintf(-low * inverse) : 0;
    }
    r.scale[i] = finite ? scale : NAN, r.zero[i] = zero;
    __m512 inverses = _mm512_set1_ps(inverse), most = _mm512_set1_ps(65536);
    __m512i zeros = _mm512_set1_epi32(zero);
    for (int64_t k = 0; k < j->stride; k += 64) {
      __m512i code[4];
      for (int q = 0; q < 4; ++q) {
        __m512 v = _mm512_mul_ps(_mm512_load_ps(r.values + k + 16 * q), inverses);
        if (j->scale) v = _mm512_min_ps(v, most);
        code[q] = _mm512_add_epi32(_mm512_cvtps_epi32(v), zeros);
      }
      __m512i words = _mm512_packs_epi32(code[0], code[1]), more = _mm512_packs_epi32(code[2], code[3]);
      __m512i bytes = _mm512_permutexvar_epi32(order, _mm512_packus_epi16(words, more));
      _mm512_store_si512(r.codes + i * j->stride + k, bytes);
    }
  }
  return r;
}

/* ---- many rows: 64 outputs at a time, their weights laid out as [depth / 4][64][4] ---- */
typedef struct {
  __m512i sum[4]; __m512 scale[4], bias[4]; __mmask16 mask[4];
  int8_t weight[] __attribute__((aligned(64)));
} Panel;

static void pack(const Job *j, int64_t n, Panel *to) {
  __m512i ones = _mm512_set1_epi8(1);
  for (int q = 0; q < 4; ++q) {
    __m512i sum = _mm512_setzero_si512();
    int64_t start = n + 16 * q, left = j->width - start;
    for (int64_t k = 0; k < j->depth; k += 64) {
      __mmask64 mask = head64(j->depth - k);
      __m512i r[16];
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
    }
    to->mask[q] = head16(left), to->sum[q] = sum;
    to->scale[q] = load(j->weight_scale, start, to->mask[q]);
    to->bias[q] = j->bias.data ? load(j->bias, start, to->mask[q]) : _mm512_set1_ps(-0.f);
  }
}
INLINE __m512 undo(__m512i total, __m512 weight_scale, float scale, __m512 bias) {
  __m512 v = _mm512_mul_ps(_mm512_mul_ps(_mm512_cvtepi32_ps(total), weight_scale), _mm512_set1_ps(scale));
  return _mm512_add_ps(v, bias);
}
INLINE void tile(const int R, const Job *j, const Panel *p, Rows rows, int64_t i, int64_t first, int64_t n) {
  __m512i sum[TILE][4];
  const uint8_t *codes = rows.codes + i * j->stride;
  #pragma GCC unroll 6
  for (int r = 0; r < R; ++r)
    #pragma GCC unroll 4
    for (int q = 0; q < 4; ++q) sum[r][q] = _mm512_setzero_si512();
  int64_t steps = (j->depth + 3) / 4, stride = j->stride;
  for (int64_t k = 0; k < steps; ++k) {
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
    __m512i zero = _mm512_set1_epi32(rows.zero[i + r]);
    __m512 v[4];
    #pragma GCC unroll 4
    for (int q = 0; q < 4; ++q) {
      __m512i total = _mm512_sub_epi32(sum[r][q], _mm512_mullo_epi32(zero, p->sum[q]));
      v[q] = undo(total, p->scale[q], rows.scale[i + r], p->bias[q]);
    }
    if (j->activation) {
      __m512 w[4] = {v[0], v[1], v[2], v[3]}; /* a copy, so that the rest stays in registers */
      activate(j->activation, w, 4);
      v[0] = w[0], v[1] = w[1], v[2] = w[2], v[3] = w[3];
    }
    #pragma GCC unroll 4
    for (int q = 0; q < 4; ++q) store(j->out, j->x.half, (first + i + r) * j->width + n + 16 * q, v[q], p->mask[q]);
  }
}
static int64_t panel_bytes(const Job *j) { return sizeof(Panel) + j->stride * PANEL; }
static void lay_out(int64_t begin, int64_t end, void *job) {
  const Job *j = job;
  for (int64_t p = begin; p < end; ++p) pack(j, p * PANEL, (Panel *)(j->panels + p * panel_bytes(j)));
}
static void many(int64_t begin, int64_t end, void *job) {
  const Job *j = job;
  int64_t blocks = parts(j->rows, j->block), panels = parts(j->width, PANEL);
  Panel *own = j->panels ? NULL : aligned_alloc(64, panel_bytes(j));
  for (int64_t task = begin; task < end; ++task) {
    int64_t first = task % blocks * j->block, from = task / blocks * j->columns;
    int64_t count = j->rows - first < j->block ? j->rows - first : j->block;
    Rows rows = quantize(j, first, count);
    int64_t step = own ? j->depth * PANEL : panel_bytes(j), share = parts(step, parts(count, TILE));
    int64_t row = j->depth * (j->x.half ? 2 : 4), tiles = parts(count, TILE) * least(j->columns, panels - from);
    const char *ahead = (const char *)j->x.data + (first + count) * row;
    int64_t portion = blocks > 1 ? parts(count * row, tiles) : 0; /* of the next rows */
    for (int64_t p = from; p < from + j->columns && p < panels; ++p) {
      const Panel *panel = own ? own : (const Panel *)(j->panels + p * step);
      const int8_t *soon = (own ? j->weight : j->panels) + (p + 1) * step; /* of the next panel */
      int64_t i = 0, n = p * PANEL;
      if (own) pack(j, n, own);
      for (; i + TILE <= count; i += TILE, soon += share, ahead += portion) {
        for (int64_t at = 0; at < share; at += 64) _mm_prefetch(soon + at, _MM_HINT_T0);
        for (int64_t at = 0; at < portion; at += 64) _mm_prefetch(ahead + at, _MM_HINT_T0);
        tile(6, j, panel, rows, i, first, n);
      }
      switch (count - i) {
        case 5: tile(5, j, panel, rows, i, first, n); break;
        case 4: tile(4, j, panel, rows, i, first, n); break;
        case 3: tile(3, j, panel, rows, i, first, n); break;
        case 2: tile(2, j, panel, rows, i, first, n); break;
        case 1: tile(1, j, panel, rows, i, first, n); break;
      }
    }
    free(rows.codes);
  }
  free(own);
}

/* ---- few rows: products along the weights' own rows, 4 outputs at a time ---- */
INLINE __m128i across(const __m512i s[4]) { /* the sum of each */
  __m512i ab = _mm512_add_epi32(_mm512_unpacklo_epi32(s[0], s[1]), _mm512_unpackhi_epi32(s[0], s[1]));
  __m512i cd = _mm512_add_epi32(_mm512_unpacklo_epi32(s[2], s[3]), _mm512_unpackhi_epi32(s[2], s[3]));
  __m512i all = _mm512_add_epi32(_mm512_unpacklo_epi64(ab, cd), _mm512_unpackhi_epi64(ab, cd));
  __m256i half = _mm256_add_epi32(_mm512_castsi512_si256(all), _mm512_extracti64x4_epi64(all, 1));
  return _mm_add_epi32(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
}
INLINE void strip(const int R, const Job *j, Rows rows, int64_t i, int64_t n) {
  __m512i sum[4][4], own[4], v[4], ones = _mm512_set1_epi8(1);
  const int8_t *w[4];
  const uint8_t *codes = rows.codes + i * j->stride;
  int64_t left = j->width - n, stride = j->stride, depth = j->depth;
  #pragma GCC unroll 4
  for (int q = 0; q < 4; ++q) {
    w[q] = j->weight + (n + (q < left ? q : 0)) * depth, own[q] = _mm512_setzero_si512();
    #pragma GCC unroll 4
    for (int r = 0; r < R; ++r) sum[r][q] = _mm512_setzero_si512();
  }
  for (int64_t k = 0; k < depth; k += 64) {
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
  __mmask16 mask = head16(left < 4 ? left : 4);
  __m128i sums = across(own);
  __m512 scale = load(j->weight_scale, n, mask), bias = j->bias.data ? load(j->bias, n, mask) : _mm512_set1_ps(-0.f);
  #pragma GCC unroll 4
  for (int r = 0; r < R; ++r) {
    __m128i total = _mm_sub_epi32(across(sum[r]), _mm_mullo_epi32(_mm_set1_epi32(rows.zero[i + r]), sums));
    __m512 v = undo(_mm512_castsi128_si512(total), scale, rows.scale[i + r], bias);
    if (j->activation) activate(j->activation, &v, 1);
    store(j->out, j->x.half, (i + r) * j->width + n, v, mask);
  }
}
static void few(int64_t begin, int64_t end, void *job) {
  const Job *j = job;
  Rows rows = quantize(j, 0, j->rows);
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

static void linear(Job j) {
  j.stride = parts(j.depth, 64) * 64;
  if (j.rows <= FEW) { spread(parts(j.width, 4), 4 * j.depth * (j.rows + 3), few, &j); return; }
  int64_t workers = threads();
  j.block = parts(parts(j.rows, workers), TILE) * TILE;
  if (j.block * j.stride > NEAR) j.block = BLOCK;
  if (j.block < 4 * TILE) j.block = 4 * TILE;
  int64_t panels = parts(j.width, PANEL), blocks = parts(j.rows, j.block), groups = 1;
  while (blocks * groups < workers && groups < panels) ++groups;
  j.columns = parts(panels, groups), groups = parts(panels, j.columns);
  j.panels = NULL;
  if (blocks > 1) { /* else each task lays out its own */
    j.panels = aligned_alloc(64, panels * panel_bytes(&j));
    spread(panels, 8 * PANEL * j.depth, lay_out, &j);
  }
  spread(blocks * groups, j.block * j.depth * j.columns * PANEL, many, &j);
  free(j.panels);
}

/* ---- the operator ---- */
static void operator(Value *stack, uint64_t inputs, uint64_t outputs) {
  Job j; Floats scale;
  Tensor x = (Tensor)stack[0], weight = (Tensor)stack[1], zero = optional(stack[6]);
  int64_t dims, shape[16];
  int known = floats(x, &j.x) & floats((Tensor)stack[2], &j.weight_scale) & floats(optional(stack[3]), &j.bias)
            & floats(optional(stack[4]), &j.factor) & floats(optional(stack[5]), &scale);
  aoti_torch_get_dim(x, &dims);
  int64_t depth = sizes(weight)[1];
  if (!known || !whole(weight) || dims > 16 || depth > DEEPEST || !dims || sizes(x)[dims - 1] != depth) {
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
  if (j.rows && j.width) linear(j);
  release(stack, 3, 4);
  stack[0] = (Value)out;
}
int32_t install(const char *name) { return implement(name, operator); }
"""
