"""What our C kernels share, whatever their vectors: work spread over torch's threads, torch's C interface."""

SOURCE = r"""
#include <immintrin.h>
#include <math.h>
#include <stdint.h>
#include <stdlib.h>

#define INLINE static inline __attribute__((always_inline))
typedef struct { const void *data; int64_t half; } Floats; /* bfloat16 where half is not 0, else float32 */

INLINE float value_of(Floats from) { /* the first */
  union { uint32_t bits; float value; } held;
  held.bits = from.half ? (uint32_t)*(const uint16_t *)from.data << 16 : *(const uint32_t *)from.data;
  return held.value;
}
INLINE int64_t parts(int64_t whole, int64_t part) { return (whole + part - 1) / part; }
INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

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
