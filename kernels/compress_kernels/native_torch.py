"""What our C kernels share: vectors of float32 or bfloat16, work spread over torch's threads, torch's C interface."""

SOURCE = r"""
#include <immintrin.h>
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#if !defined(__AVX512VNNI__) || !defined(__AVX512VL__) || !defined(__AVX512BW__)
#error this processor has no AVX512-VNNI
#endif

#define INLINE static inline __attribute__((always_inline))
typedef struct { const void *data; int64_t half; } Floats; /* bfloat16 where half is not 0, else float32 */

INLINE __mmask16 head16(int64_t n) { return n >= 16 ? 0xffff : n <= 0 ? 0 : (1u << n) - 1; }
INLINE __mmask64 head64(int64_t n) { return n >= 64 ? ~0ull : n <= 0 ? 0 : (1ull << n) - 1; }
INLINE int64_t parts(int64_t whole, int64_t part) { return (whole + part - 1) / part; }
INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
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

/* ---- activations ---- */
enum { NONE, RELU, GELU, GELU_TANH, SILU };
INLINE __m512 polynomial(__m512 x, const float *terms, int count) { /* highest power first */
  __m512 p = _mm512_set1_ps(terms[0]);
  for (int i = 1; i < count; ++i) p = _mm512_fmadd_ps(p, x, _mm512_set1_ps(terms[i]));
  return p;
}
INLINE __m512 power_of_2(__m512 x) { /* within 2e-7; NaN stays NaN */
  static const float terms[] = {1.32763793e-3f, 9.67551023e-3f, 5.55071309e-2f, 2.40221202e-1f, 6.93146944e-1f, 1};
  x = _mm512_max_ps(_mm512_set1_ps(-150), _mm512_min_ps(_mm512_set1_ps(126), x));
  __m512 whole = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  return _mm512_scalef_ps(polynomial(_mm512_sub_ps(x, whole), terms, 6), whole);
}
INLINE __m512 sigmoid_of(__m512 x, __m512 v) { /* v / (1 + e^-x) */
  __m512 power = power_of_2(_mm512_mul_ps(x, _mm512_set1_ps(-1.44269504f)));
  return _mm512_div_ps(v, _mm512_add_ps(_mm512_set1_ps(1), power));
}
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
INLINE __m512 gelu(__m512 v) { /* within 5e-7 */
  __m512 at = _mm512_min_ps(_mm512_set1_ps(15.49f), _mm512_mul_ps(_mm512_abs_ps(v), _mm512_set1_ps(1 / .36f)));
  __m512 piece = _mm512_add_ps(at, _mm512_set1_ps(12582912)); /* its last bits are the nearest whole number */
  __m512 off = _mm512_sub_ps(at, _mm512_sub_ps(piece, _mm512_set1_ps(12582912)));
  __m512i index = _mm512_castps_si512(piece);
  __m512 tail = _mm512_permutexvar_ps(index, _mm512_load_ps(tails));
  for (int i = 1; i < 5; ++i)
    tail = _mm512_fmadd_ps(tail, off, _mm512_permutexvar_ps(index, _mm512_load_ps(tails + 16 * i)));
  return _mm512_sub_ps(_mm512_max_ps(_mm512_setzero_ps(), v), tail);
}
INLINE __m512 gelu_tanh(__m512 v) {
  __m512 cubed = _mm512_fmadd_ps(_mm512_mul_ps(v, v), _mm512_set1_ps(.044715f), _mm512_set1_ps(1));
  return sigmoid_of(_mm512_mul_ps(_mm512_mul_ps(v, cubed), _mm512_set1_ps(1.59576912f)), v);
}
static __attribute__((noinline)) void activate(int64_t kind, __m512 *v, int count) {
  for (int i = 0; kind == RELU && i < count; ++i) v[i] = _mm512_max_ps(_mm512_setzero_ps(), v[i]);
  if (kind == GELU && count == 4) { /* four chains at once */
    #pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) v[i] = gelu(v[i]);
  } else if (kind == GELU) for (int i = 0; i < count; ++i) v[i] = gelu(v[i]);
  for (int i = 0; kind == GELU_TANH && i < count; ++i) v[i] = gelu_tanh(v[i]);
  for (int i = 0; kind == SILU && i < count; ++i) v[i] = sigmoid_of(v[i], v[i]);
}

/* ---- torch's threads ---- */
enum { GRAIN = 1 << 18 };
typedef void (*Part)(int64_t begin, int64_t end, void *job);
int32_t torch_parallel_for(int64_t begin, int64_t end, int64_t grain, Part part, void *job);
int32_t torch_get_num_threads(uint32_t *count);
static int64_t threads(void) { uint32_t count = 1; torch_get_num_threads(&count); return count; }
static void spread(int64_t count, int64_t cost, Part part, void *job) { /* cost: about the products of one */
  int64_t grain = GRAIN / (cost + 1) + 1;
  if (count <= grain) part(0, count, job);
  else torch_parallel_for(0, count, grain, part, job);
}

/* ---- torch's tensors; operators get and give them as Values ---- */
typedef uint64_t Value;
typedef void *Tensor;
int32_t aoti_torch_get_data_ptr(Tensor, void **);
int32_t aoti_torch_get_dtype(Tensor, int32_t *);
int32_t aoti_torch_get_dim(Tensor, int64_t *);
int32_t aoti_torch_get_sizes(Tensor, int64_t **);
int32_t aoti_torch_get_strides(Tensor, int64_t **);
int32_t aoti_torch_is_contiguous(Tensor, _Bool *);
int32_t aoti_torch_delete_tensor_object(Tensor);
int32_t aoti_torch_new_uninitialized_tensor(Tensor *);
int32_t aoti_torch_empty_strided(int64_t, const int64_t *, const int64_t *, int32_t, int32_t, int32_t, Tensor *);
int32_t aoti_torch_dtype_float32(void), aoti_torch_dtype_bfloat16(void), aoti_torch_dtype_bool(void);
int32_t aoti_torch_device_type_cpu(void);
int32_t aoti_torch_call_dispatcher(const char *, const char *, Value *);
int32_t aoti_torch_library_init_impl(const char *, const char *, const char *, uint32_t, void **);
int32_t aoti_torch_library_impl(void *, const char *, void (*)(Value *, uint64_t, uint64_t));
void operator_delete(void *) __asm__("_ZdlPv"); /* torch hands optional arguments over in C++ memory */

INLINE Tensor optional(Value value) { return value ? (Tensor)*(Value *)value : NULL; }
INLINE void *address(Tensor t) { void *data = NULL; if (t) aoti_torch_get_data_ptr(t, &data); return data; }
INLINE const int64_t *sizes(Tensor t) { int64_t *found; aoti_torch_get_sizes(t, &found); return found; }
INLINE int whole(Tensor t) { _Bool found; aoti_torch_is_contiguous(t, &found); return found; }
static int floats(Tensor t, Floats *out) { /* 0: of a kind that is not handled here; NULL is */
  int32_t type;
  *out = (Floats){NULL, 0};
  if (!t) return 1;
  aoti_torch_get_dtype(t, &type);
  *out = (Floats){address(t), type == aoti_torch_dtype_bfloat16()};
  return whole(t) && (out->half || type == aoti_torch_dtype_float32());
}
static Tensor empty(int64_t dims, const int64_t *shape, int64_t half) {
  int64_t strides[16], step = 1;
  Tensor made;
  for (int64_t d = dims - 1; d >= 0; --d) strides[d] = step, step *= shape[d] ? shape[d] : 1;
  int32_t type = half ? aoti_torch_dtype_bfloat16() : aoti_torch_dtype_float32();
  aoti_torch_empty_strided(dims, shape, strides, type, aoti_torch_device_type_cpu(), 0, &made);
  return made;
}
static void release(Value *stack, int required, int optionals) { /* the arguments, which are ours to free */
  for (int i = 0; i < required; ++i) aoti_torch_delete_tensor_object((Tensor)stack[i]);
  for (int i = required; i < required + optionals; ++i)
    if (stack[i]) aoti_torch_delete_tensor_object(optional(stack[i])), operator_delete((void *)stack[i]);
}
static void hand_over(const char *operator, Value *stack) { /* to another; what that raises is lost */
  Tensor none;
  if (!aoti_torch_call_dispatcher(operator, "", stack)) return;
  aoti_torch_new_uninitialized_tensor(&none), stack[0] = (Value)none;
}
static int32_t implement(const char *name, void (*operator)(Value *, uint64_t, uint64_t)) {
  void *library; /* lives as long as the process */
  int32_t failed = aoti_torch_library_init_impl("compress", "CPU", __FILE__, __LINE__, &library);
  return failed ? failed : aoti_torch_library_impl(library, name, operator);
}
"""
