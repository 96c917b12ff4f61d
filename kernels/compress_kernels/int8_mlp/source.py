"""int8_mlp in C: a block of rows passes both layers before the next one starts; what is between stays in the cache."""

from compress_kernels.int8_linear.source import SOURCES as LINEAR

MLP = r"""
enum { BETWEEN = 400 << 10, SMALL = 1 << 20 }; /* bytes: beside the weights in the cache, and alone */
typedef struct { Job up, down; } Pair;

static void both(int64_t begin, int64_t end, void *job) {
  const Pair *pair = job;
  int64_t most = pair->up.block, bytes = pair->up.x.half ? 2 : 4, width = pair->up.width;
  void *between = aligned_alloc(64, parts(most * width * bytes, 64) * 64);
  for (int64_t block = begin; block < end; ++block) {
    int64_t first = block * most, count = least(most, pair->up.rows - first);
    Job up = rows_from(&pair->up, first), down = rows_from(&pair->down, first);
    up.out = between, down.x = (Floats){between, up.x.half};
    multiply(&up, count, 0, parts(up.width, PANEL), NULL);
    multiply(&down, count, 0, parts(down.width, PANEL), NULL);
  }
  free(between);
}
static void mlp(Pair pair) {
  Job *up = &pair.up, *down = &pair.down;
  int64_t bytes = up->x.half ? 2 : 4, workers = threads(), most = BETWEEN / (up->width * bytes) / TILE * TILE;
  most = most < 4 * TILE ? 4 * TILE : least(most, BLOCK);
  int64_t blocks = parts(parts(up->rows, most), workers) * workers;
  up->block = parts(parts(up->rows, blocks), TILE) * TILE;
  int64_t all = up->rows * up->width * bytes;
  if (all <= SMALL || up->block < 4 * TILE) { /* a layer after the other, each over all threads */
    void *between = aligned_alloc(64, parts(all, 64) * 64);
    up->out = between, down->x = (Floats){between, up->x.half};
    linear(*up), linear(*down);
    free(between);
    return;
  }
  lay_out_all(up), lay_out_all(down);
  spread(parts(up->rows, up->block), up->block * up->depth * up->width * 2, both, &pair);
  free(up->panels), free(down->panels);
}

static int layer(Job *j, Value *stack) { /* weight, scale, bias, factor; 0: not of a kind that is handled here */
  Tensor weight = (Tensor)stack[0];
  int known = floats((Tensor)stack[1], &j->weight_scale) & floats(optional(stack[2]), &j->bias)
            & floats(optional(stack[3]), &j->factor) & whole(weight);
  static const int32_t unused = 128;
  j->weight = address(weight), j->width = sizes(weight)[0], j->depth = sizes(weight)[1];
  j->scale = NULL, j->zero = &unused;
  return known && j->depth && j->depth <= DEEPEST;
}
static void operator(Value *stack, uint64_t inputs, uint64_t outputs) {
  Pair pair; Job *up = &pair.up, *down = &pair.down;
  Tensor x = (Tensor)stack[0];
  int64_t dims, shape[16], group = (int64_t)stack[10];
  int known = floats(x, &up->x) & layer(up, stack + 1) & layer(down, stack + 5);
  aoti_torch_get_dim(x, &dims);
  if (!known || dims > 16 || !dims || sizes(x)[dims - 1] != up->depth || up->width != down->depth || group % 64) {
    hand_over("compress::int8_mlp_plain", stack);
    return;
  }
  up->rows = 1;
  for (int64_t d = 0; d < dims - 1; ++d) shape[d] = sizes(x)[d], up->rows *= shape[d];
  shape[dims - 1] = down->width, down->rows = up->rows;
  Tensor out = empty(dims, shape, up->x.half);
  up->activation = (int64_t)stack[9], down->activation = NONE;
  up->out = NULL, down->x = up->x, down->out = address(out);
  prepare(up, group), prepare(down, group);
  if (up->rows && down->width) mlp(pair);
  release(stack, 3, 2), release(stack + 5, 2, 2);
  stack[0] = (Value)out;
}
int32_t install(const char *name) { return implement(name, operator); }
"""
SOURCES = tuple(source + MLP for source in LINEAR)
