"""What our C kernels share, whatever their vectors: tables, work spread over torch's threads, torch's C interface."""

SOURCE = r"""
#include <immintrin.h>
#include <math.h>
#include <stdint.h>
#include <stdlib.h>

#define INLINE static inline __attribute__((always_inline))
typedef struct { const void *data; int64_t half; } Floats; /* bfloat16 where half is not 0, else float32 */

INLINE float first(Floats from) {
  union { uint32_t bits; float value; } held;
  held.bits = from.half ? (uint32_t)*(const uint16_t *)from.data << 16 : *(const uint32_t *)from.data;
  return held.value;
}
INLINE int64_t parts(int64_t whole, int64_t part) { return (whole + part - 1) / part; }
INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

/* ---- activations: their tables, for vectors of any width ---- */
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
