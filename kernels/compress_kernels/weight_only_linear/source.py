"""The C of weight_only_linear: products straight from the stored codes.

One or two rows of x are limited by reading the weight. Each becomes 16-bit integers, kept as a high and a low signed
byte, with one step a chunk of 64 inputs. A product of the codes, unpacked to unsigned bytes, with them is an exact sum
in int32; scales come once a chunk, zero points once a row by the sums of x. So the layout on disk is read at nearly the
speed of the memory, and x loses less than in bf16. More rows are limited by arithmetic, which is in bf16.
"""

from compress_kernels.weight_only_linear.bf16_source import BFLOATS

FEW = 256  # rows up to which this beats dequantizing and torch's product (576x1536, 1536x576; more were not tried)

CODES = r"""
#if !defined(__AVX512VBMI__) || !defined(__AVX512BF16__)
#error this processor has no AVX-512 with VBMI and BF16
#endif
#include <string.h>

// Legend: R rows of x, K input features, N output features, G groups, C chunks of 64 input features
typedef int64_t i64;
typedef __m512 vf;
typedef __m512i vi;
#define loadi _mm512_loadu_si512
#define loadf _mm512_loadu_ps
#define bytes(n) (~0ull >> (64 - (n)))

typedef struct {
    Floats x, scale, bias, factor;
    const uint8_t *words;
    const int32_t *zeros;
    void *out;
    int8_t *codes;  // of the one row of x
    float *steps, *sums;
    uint16_t *halves;  // x in bf16
    int32_t *groups;  // of 16 units of 64 or 16 inputs each, counted from the first of the 16
    i64 R, K, N, G, C, stride, padded, full, rest, group, unit;
    int bits;
    uint8_t places[64], shifts[64];
} Layer;

// The codes of a chunk as bytes, offset binary, of which `size` packed bytes lie within the row. bits 0: any width.
INLINE vi unpack(const Layer *l, const uint8_t *p, int bits, int size) {
    if (bits == 8) return size == 64 ? loadi(p) : _mm512_maskz_loadu_epi8(bytes(size), p);
    if (bits == 4) {
        __m256i b = size == 32 ? _mm256_loadu_si256((const __m256i *)p) : _mm256_maskz_loadu_epi8(bytes(size), p);
        vi w = _mm512_cvtepu8_epi16(b);
        return _mm512_and_si512(_mm512_or_si512(w, _mm512_slli_epi16(w, 4)), _mm512_set1_epi8(15));
    }
    vi w = _mm512_permutexvar_epi8(loadi(l->places), _mm512_maskz_loadu_epi8(bytes(size), p));
    return _mm512_and_si512(_mm512_multishift_epi64_epi8(loadi(l->shifts), w), _mm512_set1_epi8((1 << l->bits) - 1));
}

// The zero points of 16 groups of a weight row, offset binary.
INLINE vf zeros(const Layer *l, i64 n, i64 g) {
    if (!l->zeros) return _mm512_set1_ps(1 << (l->bits - 1));
    __mmask16 m = head16(l->G - g);
    i64 bit = n * l->bits, shift = bit % 32;
    const int32_t *p = l->zeros + bit / 32 * l->G + g;
    vi v = _mm512_srl_epi32(_mm512_maskz_loadu_epi32(m, p), _mm_cvtsi64_si128(shift));
    if (shift + l->bits > 32)
        v = _mm512_or_si512(v, _mm512_sll_epi32(_mm512_maskz_loadu_epi32(m, p + l->G), _mm_cvtsi64_si128(32 - shift)));
    return _mm512_cvtepi32_ps(_mm512_and_si512(v, _mm512_set1_epi32((1 << l->bits) - 1)));
}

INLINE vf input(const Layer *l, i64 r, i64 k) {
    __mmask16 m = head16(l->K - k);
    vf v = load(l->x, r * l->K + k, m);
    return l->factor.data ? _mm512_mul_ps(v, load(l->factor, k, m)) : v;
}

INLINE vf scales(const Layer *l, i64 n, i64 g) {
    return load(l->scale, n * l->G + g, head16(l->G - g));
}

// The group that the 16 units from this one on begin with; l->groups[unit..] tells the places after it.
INLINE i64 base(const Layer *l, i64 unit) { return (uint32_t)(unit * l->unit) / (uint32_t)l->group; }

static void prepare(Layer *l, i64 units) {
    for (i64 i = 0; i < units; i++) l->groups[i] = base(l, i) - base(l, i / 16 * 16);
    for (int i = 0; i < 64; i++) l->places[i] = i / 8 * l->bits + i % 8, l->shifts[i] = i % 8 * l->bits;
}

INLINE vf unit_scales(const Layer *l, i64 n, i64 unit) {
    return _mm512_permutexvar_ps(loadi(l->groups + unit), scales(l, n, base(l, unit)));
}
"""

PRODUCT = r"""
// The row of x in chunks: high bytes, low bytes, a step for each; and the sums of the rounded x by group.
static void quantize(const Layer *l) {
    for (i64 c = 0; c < l->C; c++) {
        vf v[4], top = _mm512_setzero_ps(), poison = top;
        for (int i = 0; i < 4; i++) {
            v[i] = input(l, 0, c * 64 + i * 16);
            top = _mm512_max_ps(top, _mm512_abs_ps(v[i]));
            poison = _mm512_fmadd_ps(v[i], _mm512_setzero_ps(), poison);  // NaN where a value is NaN or infinite
        }
        float most = _mm512_reduce_max_ps(top), step = most > 1e-30f ? most / 32512 : 1;
        l->steps[c] = step + _mm512_reduce_add_ps(poison);
        for (int i = 0; i < 4; i++) {
            i64 k = c * 64 + i * 16;
            vi q = _mm512_cvtps_epi32(_mm512_mul_ps(v[i], _mm512_set1_ps(1 / step)));
            vi high = _mm512_srai_epi32(_mm512_add_epi32(q, _mm512_set1_epi32(128)), 8);
            _mm_storeu_si128((__m128i *)(l->codes + c * 128 + i * 16), _mm512_cvtepi32_epi8(high));
            _mm_storeu_si128((__m128i *)(l->codes + c * 128 + 64 + i * 16), _mm512_cvtepi32_epi8(q));
            if (k < l->K) l->sums[(uint32_t)k / (uint32_t)l->group] += _mm512_reduce_add_epi32(q) * l->steps[c];
        }
    }
}

INLINE vf dot(vi u, const int8_t *codes) {
    vi high = _mm512_slli_epi32(_mm512_dpbusd_epi32(_mm512_setzero_si512(), u, loadi(codes)), 8);
    return _mm512_cvtepi32_ps(_mm512_dpbusd_epi32(high, u, loadi(codes + 64)));
}

INLINE __m128 sums4(const vf *v) {
    vf a = _mm512_add_ps(_mm512_unpacklo_ps(v[0], v[1]), _mm512_unpackhi_ps(v[0], v[1]));
    vf b = _mm512_add_ps(_mm512_unpacklo_ps(v[2], v[3]), _mm512_unpackhi_ps(v[2], v[3]));
    __m512d x = _mm512_castps_pd(a), y = _mm512_castps_pd(b);
    a = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(x, y)), _mm512_castpd_ps(_mm512_unpackhi_pd(x, y)));
    __m256 half = _mm256_add_ps(_mm512_castps512_ps256(a), _mm512_extractf32x8_ps(a, 1));
    return _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
}

// 4 weight rows times the row of x. A group is whole chunks, or a multiple of 16 inputs.
INLINE void tile(const Layer *l, i64 n, float *room, float *out, int bits, int whole_chunks) {
    const vi fourfold = _mm512_set_epi32(3, 3, 3, 3, 2, 2, 2, 2, 1, 1, 1, 1, 0, 0, 0, 0);
    const int size = 8 * (bits ? bits : l->bits);
    const uint8_t *words[4];
    vf acc[4], less[4];
    float *units[4];
    for (int i = 0; i < 4; i++) {
        i64 row = n + i < l->N ? n + i : l->N - 1;
        words[i] = l->words + row * l->stride;
        units[i] = room + i * 4 * l->padded;
        acc[i] = less[i] = _mm512_setzero_ps();
        for (i64 g = 0; g < l->G; g += 16) {
            vf sz = _mm512_mul_ps(scales(l, row, g), zeros(l, row, g));
            less[i] = _mm512_fmadd_ps(sz, _mm512_maskz_loadu_ps(head16(l->G - g), l->sums + g), less[i]);
        }
        for (i64 c = 0; c < l->C; c += 16)
            if (whole_chunks)
                _mm512_storeu_ps(units[i] + c, _mm512_mul_ps(unit_scales(l, row, c), loadf(l->steps + c)));
            else
                for (int j = 0; j < 64; j += 16)
                    _mm512_storeu_ps(units[i] + c * 4 + j, unit_scales(l, row, c * 4 + j));
    }
    for (i64 c = 0; c < l->C; c++)
        for (int i = 0; i < 4; i++) {
            vi u = unpack(l, words[i] + c * size, bits, __builtin_expect(c < l->full, 1) ? size : l->rest);
            vf t = _mm512_set1_ps(whole_chunks ? units[i][c] : l->steps[c]);
            if (!whole_chunks) t = _mm512_mul_ps(t, _mm512_permutexvar_ps(fourfold, loadf(units[i] + c * 4)));
            acc[i] = _mm512_fmadd_ps(dot(u, l->codes + c * 128), t, acc[i]);
        }
    for (int i = 0; i < 4; i++) acc[i] = _mm512_sub_ps(acc[i], less[i]);
    _mm_storeu_ps(out, sums4(acc));
}

#define WIDTHS(DO, ...) \
    if (l->bits == 4) DO(__VA_ARGS__, 4); else if (l->bits == 8) DO(__VA_ARGS__, 8); else DO(__VA_ARGS__, 0)
#define WHOLE(l, n, room, out, bits) tile(l, n, room, out, bits, 1)
#define PARTS(l, n, room, out, bits) tile(l, n, room, out, bits, 0)

static void write(const Layer *l, i64 r, i64 n, const float *values) {
    __mmask16 m = head16(l->N - n);
    vf bias = l->bias.data ? load(l->bias, n, m) : _mm512_setzero_ps();
    store(l->out, l->x.half, r * l->N + n, _mm512_add_ps(loadf(values), bias), m);
}

static void outputs(i64 begin, i64 end, void *job) {
    const Layer *l = job;
    float room[16 * l->padded], out[16];
    for (i64 n = begin * 16; n < end * 16; n += 16) {
        for (int i = 0; i < 16 && n + i < l->N; i += 4)
            if (l->unit == 64) { WIDTHS(WHOLE, l, n + i, room, out + i); }
            else { WIDTHS(PARTS, l, n + i, room, out + i); }
        write(l, 0, n, out);
    }
}

static void one_row(Layer *l) {
    i64 C = l->C, G = l->G, P = l->padded;
    l->codes = aligned_alloc(64, (C * 128 + (P + G) * 4 + 4 * P * 4 + 63) / 64 * 64);
    l->steps = (float *)(l->codes + C * 128), l->sums = l->steps + P;
    l->groups = (int32_t *)(l->sums + G);
    l->unit = l->group % 64 ? 16 : 64;
    prepare(l, l->unit == 64 ? P : 4 * P);
    memset(l->steps, 0, (P + G) * 4);
    quantize(l);
    spread(parts(l->N, 16), 16 * l->K, outputs, l);
    free(l->codes);
}
"""

CALLS = r"""
// 0 where this kind of layer is not handled: groups must be a multiple of 16 inputs, or one.
static int fill(Layer *l, i64 K, i64 N, i64 G, int bits) {
    l->K = K, l->N = N, l->G = G, l->bits = bits;
    l->C = parts(K, 64), l->padded = parts(K, 1024) * 16, l->group = G == 1 ? l->C * 64 : K / G;
    l->stride = parts(K * bits, 32) * 4, l->full = K / 64, l->rest = parts(K % 64 * bits, 8);
    return G == 1 || K % G == 0 && l->group % 16 == 0;
}

// The whole weight in bf16; 0 where it is not handled.
int weight_only_dequantize(const void *words, const void *scale, int64_t half, const void *zeros, void *out, i64 K,
                           i64 N, i64 G, int bits) {
    Layer l = {.words = words, .scale = {scale, half}, .zeros = zeros, .out = out, .unit = 16};
    if (!fill(&l, K, N, G, bits)) return 0;
    int32_t groups[l.padded * 4];
    l.groups = groups;
    prepare(&l, l.padded * 4);
    spread(N, K, weights, &l);
    return 1;
}

// (x, words, scale, zeros, bias, factor, bits)
static void operator(Value *stack, uint64_t inputs, uint64_t outputs) {
    Layer l = {0};
    Tensor x = (Tensor)stack[0], words = (Tensor)stack[1], zeros = optional(stack[3]);
    i64 dims, shape[16];
    aoti_torch_get_dim(x, &dims);
    int known = floats(x, &l.x) & floats((Tensor)stack[2], &l.scale) & floats(optional(stack[4]), &l.bias)
              & floats(optional(stack[5]), &l.factor) & whole(words) & (!zeros || whole(zeros)) & (dims > 0)
              & (dims < 17);
    l.R = 1;
    for (i64 d = 0; known && d < dims; d++) shape[d] = sizes(x)[d], l.R *= d < dims - 1 ? shape[d] : 1;
    known = known && l.R > 0 && l.R <= FEW_ROWS
         && fill(&l, shape[dims - 1], sizes(words)[0], sizes((Tensor)stack[2])[1], (int)stack[6]);
    if (!known) {
        hand_over("compress::weight_only_linear_plain", stack);
        return;
    }
    shape[dims - 1] = l.N;
    Tensor out = empty(dims, shape, l.x.half);
    l.words = address(words), l.zeros = address(zeros), l.out = address(out);
    if (l.R > 2) some_rows(&l);
    else for (i64 r = 0; r < l.R; r++) {
        Layer row = l;
        row.x.data = (char *)l.x.data + r * l.K * (l.x.half ? 2 : 4);
        row.out = (char *)l.out + r * l.N * (l.x.half ? 2 : 4);
        one_row(&row);
    }
    release(stack, 3, 3);
    stack[0] = (Value)out;
}

int32_t install(const char *name) { return implement(name, operator); }
"""

SOURCE = f"#define FEW_ROWS {FEW}\n" + CODES + PRODUCT + BFLOATS + CALLS
