"""int8_linear in C, around what `wide_source` and `narrow_source` do with the vectors of a processor.

A block of rows is quantized into the cache, then multiplied by some outputs at a time, whose weights are laid out anew
in every call: that costs a twentieth of 128 rows, and no second copy of the weights is ever kept. Few rows are
multiplied along the weights' own rows. All sums are exact and every float step is one rounding, so torch's path gives
the same.
"""

from compress_kernels.int8_linear.narrow_source import SOURCE as NARROW
from compress_kernels.int8_linear.wide_source import SOURCE as WIDE
from compress_kernels.narrow_vectors import SOURCE as NARROW_VECTORS
from compress_kernels.wide_vectors import SOURCE as WIDE_VECTORS

JOB = r"""
enum { FEW = 8, BLOCK = 60, NEAR = 400 << 10, DEEPEST = 65536 };
typedef struct {
  Floats x, weight_scale, bias, factor;
  const int8_t *weight;
  void *out;
  int64_t rows, depth, width, activation;
  const float *scale; const int32_t *zero; /* of all activations, or NULL: found for each group of inputs of a row */
  int64_t group, groups; /* inputs of a group, a multiple of 64; groups of a row */
  int64_t stride, block, columns; /* codes of a row with its padding; rows and panels of a task */
  int8_t *panels;
} Job;
typedef struct { void *codes; float *scale; int32_t *zero; } Rows; /* and what undoes the codes of each group */
"""

DRIVER = r"""
static Rows quantize(const Job *j, int64_t count) {
  Rows r;
  int64_t all = count * j->groups, codes = count * j->stride * sizeof(Code);
  r.codes = aligned_alloc(64, codes + (all * 8 + 63) / 64 * 64 + j->stride * 4);
  float *values = (float *)((char *)r.codes + codes);
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
    encode(values, from, to, inverse, zero, j->scale != NULL, (Code *)r.codes + row * j->stride);
  }
  return r;
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
      tile(TILE, j, panel, rows, i, n);
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
static void few(int64_t begin, int64_t end, void *job) {
  const Job *j = job;
  Rows rows = quantize(j, j->rows);
  for (int64_t n = begin * 4; n < end * 4 && n < j->width; n += 4) {
    int64_t i = 0;
    for (; i + STRIP <= j->rows; i += STRIP) strip(STRIP, j, rows, i, n);
    switch (j->rows - i) {
      case 3: strip(3 < STRIP ? 3 : 1, j, rows, i, n); break; /* never where a strip is two */
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
  if (j.block * j.stride * sizeof(Code) > NEAR) j.block = BLOCK;
  if (j.block < 4 * TILE) j.block = 4 * TILE;
  int64_t panels = parts(j.width, PANEL), blocks = parts(j.rows, j.block), groups = 1;
  while (blocks * groups < workers && groups < panels) ++groups;
  j.columns = parts(panels, groups), groups = parts(panels, j.columns);
  if (blocks > 1) lay_out_all(&j); /* else each task lays out its own */
  spread(blocks * groups, j.block * j.depth * j.columns * PANEL, many, &j);
  free(j.panels);
}
"""

# The first that a processor knows the instructions of is taken.
SOURCES = (WIDE_VECTORS + JOB + WIDE + DRIVER, NARROW_VECTORS + JOB + NARROW + DRIVER)

OPERATOR = r"""
static void operator(Value *stack, uint64_t inputs, uint64_t outputs) {
  Job j; Floats scale;
  Tensor x = (Tensor)stack[0], weight = (Tensor)stack[1], zero = optional(stack[6]);
  int64_t dims, shape[16];
  int known = floats(x, &j.x) & floats((Tensor)stack[2], &j.weight_scale) & floats(optional(stack[3]), &j.bias)
            & floats(optional(stack[4]), &j.factor) & floats(optional(stack[5]), &scale);
  aoti_torch_get_dim(x, &dims);
  int64_t depth = sizes(weight)[1], group = (int64_t)stack[8];
  int fits = 0 < dims && dims <= 16 && 0 < depth && depth <= DEEPEST && group % 64 == 0;
  if (!known || !whole(weight) || !fits || sizes(x)[dims - 1] != depth) {
    hand_over("compress::int8_linear_plain", stack);
    return;
  }
  j.width = sizes(weight)[0], j.depth = depth, j.rows = 1;
  for (int64_t d = 0; d < dims - 1; ++d) shape[d] = sizes(x)[d], j.rows *= shape[d];
  shape[dims - 1] = j.width;
  Tensor out = empty(dims, shape, j.x.half);
  float fixed = scale.data ? value_of(scale) : 0;
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
