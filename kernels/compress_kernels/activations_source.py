"""The activations of our C kernels, of a `Vector` of any width, by the functions that its own source has."""

SOURCE = r"""
enum { NONE, RELU, GELU, GELU_TANH, SILU };
/* 2^x within half of a whole number, highest power first */
static const float powers[] = {1.32763793e-3f, 9.67551023e-3f, 5.55071309e-2f, 2.40221202e-1f, 6.93146944e-1f, 1};
/* |v| * (1 - its normal distribution) in 16 pieces of .36, by powers of the distance to the middle, highest first. */
static const float tails[80] __attribute__((aligned(64))) = {
  1.095164e-3f, 8.079727e-4f, 1.395945e-4f, -4.307362e-4f, -6.103003e-4f, -4.507031e-4f, -1.880342e-4f, -3.289429e-6f,
  6.399903e-5f, 5.947536e-5f, 3.489564e-5f, 1.553623e-5f, 5.570955e-6f, 1.654248e-6f, 4.131778e-7f, 8.765908e-8f,
  1.222027e-5f, 4.016216e-3f, 5.957128e-3f, 5.273770e-3f, 3.052877e-3f, 8.557142e-4f, -4.175582e-4f, -7.601464e-4f,
  -6.052427e-4f, -3.444589e-4f, -1.549799e-4f, -5.734331e-5f, -1.780152e-5f, -4.691395e-6f, -1.057565e-6f,
  -2.049922e-7f, -5.170523e-2f, -4.531802e-2f, -2.955628e-2f, -1.202786e-2f, 6.741136e-4f, 6.343641e-3f, 6.686026e-3f,
  4.699612e-3f, 2.572490e-3f, 1.154164e-3f, 4.345655e-4f, 1.391083e-4f, 3.816092e-5f, 9.018625e-6f, 1.842964e-6f,
  3.265234e-7f, 1.800001e-1f, 8.093585e-2f, 5.082176e-3f, -3.614055e-2f, -4.635680e-2f, -3.822578e-2f, -2.456032e-2f,
  -1.301121e-2f, -5.823079e-3f, -2.229503e-3f, -7.356521e-4f, -2.101663e-4f, -5.214751e-5f, -1.126253e-5f,
  -2.120620e-6f, -3.485256e-7f, 0, 1.293925e-1f, 1.697490e-1f, 1.512768e-1f, 1.079045e-1f, 6.467458e-2f, 3.323448e-2f,
  1.478671e-2f, 5.726520e-3f, 1.936381e-3f, 5.727912e-4f, 1.484009e-4f, 3.370250e-5f, 6.712955e-6f, 1.173167e-6f,
  1.799375e-7f,
};

INLINE Vector polynomial(Vector x, const float *terms, int count) { /* highest power first */
  Vector p = alike(terms[0]);
  for (int i = 1; i < count; ++i) p = fused(p, x, alike(terms[i]));
  return p;
}
INLINE Vector power_of_2(Vector x) { /* within 2e-7; NaN stays NaN */
  x = larger(alike(-126), smaller(alike(126), x));
  Vector whole = nearest(x);
  return scaled(polynomial(x - whole, powers, 6), whole);
}
INLINE Vector sigmoid_of(Vector x, Vector v) { /* v / (1 + e^-x) */
  return v / (alike(1) + power_of_2(x * alike(-1.44269504f)));
}
INLINE Vector gelu(Vector v) { /* within 5e-7 */
  Vector at = smaller(alike(15.49f), size_of(v) * alike(1 / .36f));
  Vector piece = at + alike(12582912), off = at - (piece - alike(12582912)); /* last bits: the nearest whole number */
  Vector tail = pick(tails, piece);
  for (int i = 1; i < 5; ++i) tail = fused(tail, off, pick(tails + 16 * i, piece));
  return larger(alike(0), v) - tail;
}
INLINE Vector gelu_tanh(Vector v) {
  return sigmoid_of(v * fused(v * v, alike(.044715f), alike(1)) * alike(1.59576912f), v);
}
static __attribute__((noinline)) void activate(int64_t kind, Vector *v, int count) {
  for (int i = 0; kind == RELU && i < count; ++i) v[i] = larger(alike(0), v[i]);
  if (kind == GELU && count == 4) { /* four chains at once */
    #pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) v[i] = gelu(v[i]);
  } else if (kind == GELU) for (int i = 0; i < count; ++i) v[i] = gelu(v[i]);
  for (int i = 0; kind == GELU_TANH && i < count; ++i) v[i] = gelu_tanh(v[i]);
  for (int i = 0; kind == SILU && i < count; ++i) v[i] = sigmoid_of(v[i], v[i]);
}
"""
