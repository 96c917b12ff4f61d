"""The C of weight_only_linear: products with few rows straight from the stored codes, and the weight as bf16 for many.

A row of x becomes 16-bit integers, kept as a high and a low signed byte, with one step a chunk of 64 inputs. A product
of the codes, unpacked to unsigned bytes, with them is an exact sum in int32; scales come once a chunk, zero points once
a row by the sums of x. So the layout on disk is read at the speed of the memory, and x loses less than in bf16.
"""

FEW = 8  # rows up to which this beats dequantizing and torch's product (576x1536 and 1536x576)

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
    int8_t *codes;  // of x
    float *steps, *sums;
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
// A row of x in chunks: high bytes, low bytes, a step for each; and the sums of the rounded x by group.
static void quantize(const Layer *l, i64 r) {
    int8_t *codes = l->codes + r * l->C * 128;
    float *steps = l->steps + r * l->padded, *sums = l->sums + r * l->G;
    for (i64 c = 0; c < l->C; c++) {
        vf v[4], top = _mm512_setzero_ps(), poison = top;
        for (int i = 0; i < 4; i++) {
            i64 k = c * 64 + i * 16;
            v[i] = load(l->x, r * l->K + k, head16(l->K - k));
            if (l->factor.data) v[i] = _mm512_mul_ps(v[i], load(l->factor, k, head16(l->K - k)));
            top = _mm512_max_ps(top, _mm512_abs_ps(v[i]));
            poison = _mm512_fmadd_ps(v[i], _mm512_setzero_ps(), poison);  // NaN where a value is NaN or infinite
        }
        float most = _mm512_reduce_max_ps(top), step = most > 1e-30f ? most / 32512 : 1;
        steps[c] = step + _mm512_reduce_add_ps(poison);
        for (int i = 0; i < 4; i++) {
            vi q = _mm512_cvtps_epi32(_mm512_mul_ps(v[i], _mm512_set1_ps(1 / step)));
            vi high = _mm512_srai_epi32(_mm512_add_epi32(q, _mm512_set1_epi32(128)), 8);
            _mm_storeu_si128((__m128i *)(codes + c * 128 + i * 16), _mm512_cvtepi32_epi8(high));
            _mm_storeu_si128((__m128i *)(codes + c * 128 + 64 + i * 16), _mm512_cvtepi32_epi8(q));
            if (c * 64 + i * 16 < l->K)
                sums[(uint32_t)(c * 64 + i * 16) / (uint32_t)l->group] += _mm512_reduce_add_epi32(q) * steps[c];
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

// 4 weight rows times a row of x, or a weight row times 4 rows of x. Groups are whole chunks, or multiples of 16.
INLINE void tile(const Layer *l, i64 n, i64 r0, float *room, float *out, int rows, int bits, int whole_chunks) {
    const int8_t *codes = l->codes + r0 * l->C * 128;
    const float *steps = l->steps + r0 * l->padded, *sums = l->sums + r0 * l->G;
    const vi fourfold = _mm512_set_epi32(3, 3, 3, 3, 2, 2, 2, 2, 1, 1, 1, 1, 0, 0, 0, 0);
    const int many = 4 / rows, size = 8 * (bits ? bits : l->bits);
    const uint8_t *words[4];
    vf acc[4], less[4];
    float *units[4];
    for (int i = 0; i < 4; i++) acc[i] = less[i] = _mm512_setzero_ps();
    for (int i = 0; i < many; i++) {
        i64 row = n + i < l->N ? n + i : l->N - 1;
        words[i] = l->words + row * l->stride;
        units[i] = room + i * 4 * l->padded;
        for (i64 g = 0; g < l->G; g += 16) {
            vf sz = _mm512_mul_ps(scales(l, row, g), zeros(l, row, g));
            for (int r = 0; r < rows; r++)
                less[i * rows + r] = _mm512_fmadd_ps(sz, _mm512_maskz_loadu_ps(head16(l->G - g), sums + r * l->G + g),
                                                     less[i * rows + r]);
        }
        for (i64 c = 0; c < l->C; c += 16)
            if (whole_chunks)
                for (int r = 0; r < rows; r++)
                    _mm512_storeu_ps(units[i] + r * l->padded + c,
                                     _mm512_mul_ps(unit_scales(l, row, c), loadf(steps + r * l->padded + c)));
            else
                for (int j = 0; j < 64; j += 16)
                    _mm512_storeu_ps(units[i] + c * 4 + j, unit_scales(l, row, c * 4 + j));
    }
    for (i64 c = 0; c < l->C; c++)
        for (int i = 0; i < many; i++) {
            vi u = unpack(l, words[i] + c * size, bits, __builtin_expect(c < l->full, 1) ? size : l->rest);
            for (int r = 0; r < rows; r++) {
                vf t = _mm512_set1_ps(whole_chunks ? units[i][r * l->padded + c] : steps[r * l->padded + c]);
                if (!whole_chunks)
                    t = _mm512_mul_ps(t, _mm512_permutexvar_ps(fourfold, loadf(units[i] + c * 4)));
                acc[i * rows + r] = _mm512_fmadd_ps(dot(u, codes + (r * l->C + c) * 128), t, acc[i * rows + r]);
            }
        }
    for (int i = 0; i < 4; i++) acc[i] = _mm512_sub_ps(acc[i], less[i]);
    float sum[4];
    _mm_storeu_ps(sum, sums4(acc));
    for (int i = 0; i < 4; i++) out[rows == 1 ? i : i * 16] = sum[i];
}

#define TILES(ROWS, BITS, WHOLE) \
    for (int i = 0; i < 16 && n + i < l->N; i += 4 / ROWS) tile(l, n + i, r, room, out + i, ROWS, BITS, WHOLE);
#define WIDTHS(ROWS, WHOLE) \
    if (l->bits == 4) { TILES(ROWS, 4, WHOLE) } \
    else if (l->bits == 8) { TILES(ROWS, 8, WHOLE) } \
    else { TILES(ROWS, 0, WHOLE) }

// 16 outputs of 1 or 4 rows.
static void tiles(const Layer *l, i64 n, i64 r, float *room, float *out, int rows) {
    if (rows == 1) { if (l->unit == 64) { WIDTHS(1, 1) } else { WIDTHS(1, 0) } }
    else { if (l->unit == 64) { WIDTHS(4, 1) } else { WIDTHS(4, 0) } }
}

static void outputs(i64 begin, i64 end, void *job) {
    const Layer *l = job;
    float room[16 * l->padded], out[64];
    for (i64 n = begin * 16; n < end * 16; n += 16) {
        __mmask16 m = head16(l->N - n);
        vf bias = l->bias.data ? load(l->bias, n, m) : _mm512_setzero_ps();
        for (i64 r = 0, rows; r < l->R; r += rows) {
            rows = l->R - r > 1 ? 4 : 1;
            tiles(l, n, r, room, out, rows);
            for (i64 i = r; i < r + rows && i < l->R; i++)
                store(l->out, l->x.half, i * l->N + n, _mm512_add_ps(loadf(out + (i - r) * 16), bias), m);
        }
    }
}

// All rows of x; they are few, so every weight is unpacked once for 4 of them.
static void few(Layer *l) {
    i64 C = l->C, G = l->G, P = l->padded, R = l->R % 4 > 1 ? (l->R + 3) / 4 * 4 : l->R;
    l->codes = aligned_alloc(64, (R * (C * 128 + (P + G) * 4) + 4 * P * 4 + 63) / 64 * 64);
    l->steps = (float *)(l->codes + R * C * 128), l->sums = l->steps + R * P;
    l->groups = (int32_t *)(l->sums + R * G);
    l->unit = l->group % 64 ? 16 : 64;
    prepare(l, l->unit == 64 ? P : 4 * P);
    memset(l->codes + l->R * C * 128, 0, (R - l->R) * C * 128);
    memset(l->steps, 0, R * (P + G) * 4);
    for (i64 r = 0; r < l->R; r++) quantize(l, r);
    spread(parts(l->N, 16), 16 * l->K * l->R, outputs, l);
    free(l->codes);
}
"""

DEQUANTIZE = r"""
INLINE void dequantize_row(const Layer *l, i64 n, float *scale, float *zero, uint16_t *out, int bits) {
    const int size = 8 * (bits ? bits : l->bits);
    for (i64 c = 0; c < l->C; c++) {
        if (c % 4 == 0) {  // 16 units of 16 inputs
            _mm512_storeu_ps(scale, unit_scales(l, n, c * 4));
            _mm512_storeu_ps(zero, _mm512_permutexvar_ps(loadi(l->groups + c * 4), zeros(l, n, base(l, c * 4))));
        }
        int inside = c < l->full;
        vi u = unpack(l, l->words + n * l->stride + c * size, bits, inside ? size : l->rest);
        vf v[4];
        for (int i = 0; i < 4; i++) {
            v[i] = _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm512_castsi512_si128(u)));
            v[i] = _mm512_sub_ps(v[i], _mm512_set1_ps(zero[c % 4 * 4 + i]));
            v[i] = _mm512_mul_ps(v[i], _mm512_set1_ps(scale[c % 4 * 4 + i]));
            u = _mm512_alignr_epi32(u, u, 4);
        }
        uint16_t *to = out + n * l->K + c * 64;
        if (inside) {
            _mm512_storeu_si512(to, (vi)_mm512_cvtne2ps_pbh(v[1], v[0]));
            _mm512_storeu_si512(to + 32, (vi)_mm512_cvtne2ps_pbh(v[3], v[2]));
        } else
            for (int i = 0; i < 4; i++) store(to, 1, i * 16, v[i], head16(l->K - c * 64 - i * 16));
    }
}

static void weights(i64 begin, i64 end, void *job) {
    const Layer *l = job;
    float scale[16], zero[16];
    for (i64 n = begin; n < end; n++)
        if (l->bits == 4) dequantize_row(l, n, scale, zero, l->out, 4);
        else if (l->bits == 8) dequantize_row(l, n, scale, zero, l->out, 8);
        else dequantize_row(l, n, scale, zero, l->out, 0);
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
    few(&l);
    release(stack, 3, 3);
    stack[0] = (Value)out;
}

int32_t install(const char *name) { return implement(name, operator); }
"""

SOURCE = f"#define FEW_ROWS {FEW}\n" + CODES + PRODUCT + DEQUANTIZE + CALLS
