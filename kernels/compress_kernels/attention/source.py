"""The C source of attention, on top of what our kernels share: softmax(q k^T) v for a block of queries at a time."""

SOURCE = r"""
#include <string.h>

#define PANEL 64  /* keys of a panel: four registers */
#define BLOCK 24  /* queries of a block: their scores stay in the first-level cache for some hundred keys */
#define CHUNK 128 /* values that stay in the first-level cache while the queries of a block go by */

typedef struct { int64_t batch, head, row; } Strides;

typedef struct {
    Floats query, key, value;       /* all of one kind */
    const void *mask;
    void *out;                      /* [batch, queries, heads, value_depth], contiguous */
    int64_t batch, heads, groups, queries, keys, depth, value_depth;
    Strides q, k, v;                /* in elements; the last dimension is contiguous */
    Strides m; int64_t m_column;    /* of the mask, 0 where it is broadcast */
    int32_t mask_kind, causal;      /* 0 none, 1 bool, 2 float32 */
    int32_t half;                   /* products of bfloat16, two at a time; their sums stay float32 */
    float scale;
} Call;

/* A cell is one float or two bfloat16 that lie along the sum; every matrix and step below is counted in cells. */
INLINE int64_t cells(const Call *call, int64_t numbers) { return call->half ? (numbers + 1) / 2 : numbers; }

/* e^x for x <= 0 to two units in the last place; 0 below -104 */
INLINE __m512 exponential(__m512 x) {
    x = _mm512_max_ps(_mm512_set1_ps(-104.0f), x);  /* the second operand where one is NaN */
    __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), 8);
    __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);
    r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), r);
    __m512 p = _mm512_set1_ps(1.0f / 720);
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f / 120));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f / 24));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f / 6));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0.5f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f));
    return _mm512_scalef_ps(p, n);
}

/* Mask the scores of one query; is any key left? */
static int hide(float *scores, int64_t keys, int64_t visible, const Call *call, const char *mask) {
    const __m512 low = _mm512_set1_ps(-__builtin_inff());
    __mmask16 left = 0;
    for (int64_t j = 0; j < keys; j += 16) {
        __mmask16 seen = head16(visible - j);
        __m512 value = _mm512_loadu_ps(scores + j);
        if (call->mask_kind == 1) {
            __m128i flags = call->m_column ? _mm_maskz_loadu_epi8(head16(keys - j), mask + j) : _mm_set1_epi8(mask[0]);
            seen &= _mm_test_epi8_mask(flags, flags);
        } else if (call->mask_kind == 2) {
            const float *bias = (const float *)mask;
            value = _mm512_add_ps(value, call->m_column ? _mm512_maskz_loadu_ps(head16(keys - j), bias + j)
                                                        : _mm512_set1_ps(bias[0]));
        }
        value = _mm512_mask_blend_ps(seen, low, value);
        left |= _mm512_cmp_ps_mask(value, low, _CMP_NEQ_UQ);  /* NaN is left */
        _mm512_storeu_ps(scores + j, value);
    }
    return left != 0;
}

/* Scores of one query -> their exponentials; returns the inverse of the sum. NaN in one score makes all NaN. */
static float softmax(float *scores, int64_t keys) {
    __m512 high = _mm512_set1_ps(-__builtin_inff()), other = high, sum = _mm512_setzero_ps(), more = sum;
    __mmask16 tail = head16(keys % 16 ? keys % 16 : 16);
    int64_t last = up(keys, 16) - 16, j;
    for (j = 0; j + 16 < last; j += 32) {
        high = _mm512_max_ps(_mm512_loadu_ps(scores + j), high);
        other = _mm512_max_ps(_mm512_loadu_ps(scores + j + 16), other);
    }
    for (; j < last; j += 16) high = _mm512_max_ps(_mm512_loadu_ps(scores + j), high);
    high = _mm512_mask_max_ps(high, tail, _mm512_loadu_ps(scores + last), high);
    __m512 top = _mm512_set1_ps(_mm512_reduce_max_ps(_mm512_max_ps(high, other)));
    for (j = 0; j + 16 < last; j += 32) {
        __m512 one = exponential(_mm512_sub_ps(_mm512_loadu_ps(scores + j), top));
        __m512 two = exponential(_mm512_sub_ps(_mm512_loadu_ps(scores + j + 16), top));
        sum = _mm512_add_ps(sum, one);
        more = _mm512_add_ps(more, two);
        _mm512_storeu_ps(scores + j, one);
        _mm512_storeu_ps(scores + j + 16, two);
    }
    for (; j <= last; j += 16) {
        __m512 one = exponential(_mm512_sub_ps(_mm512_loadu_ps(scores + j), top));
        one = _mm512_maskz_mov_ps(j < last ? 0xffff : tail, one);
        sum = _mm512_add_ps(sum, one);
        _mm512_storeu_ps(scores + j, one);
    }
    return 1.0f / _mm512_reduce_add_ps(_mm512_add_ps(sum, more));
}

/* Floats -> their cells, in place; both end in zeros up to a multiple of 16. */
static void narrow(float *row, int64_t count) {
    for (int64_t j = 0; j < count; j += 32) {
        __m512 high = j + 16 < count ? _mm512_loadu_ps(row + j + 16) : _mm512_setzero_ps();
        _mm512_storeu_si512(row + j / 2, halves(_mm512_loadu_ps(row + j), high));
    }
}

/* 16 cells of a row whose numbers end after `left`, zeros beyond */
INLINE __m512i row_cells(const Call *call, Floats from, int64_t at, int64_t left) {
    if (!call->half) return _mm512_castps_si512(load(from, at, head16(left)));
    if (from.half) return _mm512_maskz_loadu_epi16(left < 0 ? 0 : left >= 32 ? ~0u : (1u << left) - 1,
                                                   (const uint16_t *)from.data + at);
    return halves(load(from, at, head16(left)), load(from, at + 16, head16(left - 16)));
}

/* keys from start on, [PANEL, cells of depth] -> [cells of depth, PANEL], zeros beyond the last key */
static void pack_keys(const Call *call, int64_t at, int64_t start, float *panel) {
    int64_t deep = cells(call, call->depth), numbers = call->half ? 2 : 1;
    for (int64_t j = start; j < start + PANEL; j += 16)
        for (int64_t d = 0; d < deep; d += 16) {
            __m512i row[16];
            for (int i = 0; i < 16; i++) {
                int64_t left = j + i < call->keys ? call->depth - d * numbers : 0;
                row[i] = row_cells(call, call->key, at + (j + i) * call->k.row + d * numbers, left);
            }
            transpose(row);
            for (int64_t i = 0; i < least(16, deep - d); i++)
                _mm512_storeu_si512(panel + (d + i) * PANEL + j - start, row[i]);
        }
}

static void pack_values(const Call *call, int64_t at, int64_t start, int64_t count, float *values, int64_t width) {
    const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8,
                                           23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    for (int64_t j = start; j < start + count; j += call->half ? 2 : 1, values += width)
        for (int64_t d = 0; d < width; d += 16) {
            __mmask16 inside = head16(call->value_depth - d);
            __m512 one = load(call->value, at + j * call->v.row + d, inside);
            if (call->half) { /* two keys a cell */
                __m512 two = load(call->value, at + (j + 1) * call->v.row + d, j + 1 < start + count ? inside : 0);
                one = _mm512_castsi512_ps(_mm512_permutexvar_epi16(order, halves(one, two)));
            }
            _mm512_storeu_ps(values + d, one);
        }
}

/* One head of keys and the queries of all heads that read it, in one row of queries. */
typedef struct {
    const Call *call;
    int64_t b, kv, padded, width; /* keys and depth of a value, rounded up */
    int once;                     /* keys and values are packed when a block needs them: there is only one */
    float *panels, *values, *scores, *sums, *query;
} Head;

INLINE int64_t head_of(const Head *h, int64_t row) { return h->kv * h->call->groups + row / h->call->queries; }

/* How many keys this query may see at most, and its row of the mask. */
INLINE int64_t visible(const Head *h, int64_t row) {
    const Call *call = h->call;
    int64_t seen = call->causal ? row % call->queries + call->keys - call->queries + 1 : call->keys;
    return seen < 0 ? 0 : seen;
}
INLINE const char *mask_of(const Head *h, int64_t row) {
    const Call *call = h->call;
    int64_t at = h->b * call->m.batch + head_of(h, row) * call->m.head + row % call->queries * call->m.row;
    return (const char *)call->mask + (call->mask_kind == 2 ? 4 : 1) * at;
}

/* Without the last keys that these queries may not see: a cache that was made for later tokens ends in such. */
static int64_t trimmed(const Head *h, int64_t start, int64_t rows, int64_t reach) {
    const Call *call = h->call;
    if (!call->mask_kind || !call->m_column) return reach;
    for (; reach > 0; reach--)
        for (int64_t i = start; i < start + rows; i++) {
            const char *mask = mask_of(h, i);
            if (call->mask_kind == 1 ? mask[reach - 1] : ((const float *)mask)[reach - 1] > -__builtin_inff())
                return reach;
        }
    return 0;
}

static void block(const Head *h, int64_t start, int64_t rows) {
    const Call *call = h->call;
    int64_t depth = cells(call, call->depth), padded = h->padded, width = h->width, reach = 0;
    int numbers = call->half ? 2 : 1;
    float inverse[BLOCK];
    for (int64_t i = 0; i < rows; i++) {
        int64_t row = start + i, seen = visible(h, row);
        int64_t at = h->b * call->q.batch + head_of(h, row) * call->q.head + row % call->queries * call->q.row;
        for (int64_t d = 0; d < depth; d += 16)
            _mm512_mask_storeu_epi32(h->query + i * depth + d, head16(depth - d),
                                     row_cells(call, call->query, at + d * numbers, call->depth - d * numbers));
        reach = seen > reach ? seen : reach;
    }
    reach = trimmed(h, start, rows, reach);
    for (int64_t j = 0; j < reach; j += PANEL) {
        int wide = reach - j >= PANEL ? 4 : (int)(up(reach - j, 16) / 16);
        float *panel = h->panels + (h->once ? 0 : j * depth);
        if (h->once) pack_keys(call, h->b * call->k.batch + h->kv * call->k.head, j, panel);
        product(h->query, depth, panel, PANEL, h->scores + j, padded, rows, depth, call->scale, wide, 0, call->half);
    }
    for (int64_t i = 0; i < rows; i++) {
        float *row = h->scores + i * padded;
        int64_t seen = visible(h, start + i);
        int plain = seen >= reach && !call->mask_kind;
        int left = reach > 0 && (plain || hide(row, reach, seen, call, mask_of(h, start + i)));
        if (!left) memset(row, 0, up(reach, 16) * sizeof(float));
        inverse[i] = left ? softmax(row, reach) : 0;
        if (call->half) narrow(row, reach);
    }
    for (int64_t j = 0; j < reach || j == 0; j += CHUNK) {
        int64_t deep = least(CHUNK, reach - j);
        float *values = h->values + (h->once ? 0 : cells(call, j) * width);
        if (h->once) pack_values(call, h->b * call->v.batch + h->kv * call->v.head, j, deep, values, width);
        for (int64_t d = 0; d < width; d += 64) {
            int wide = width - d >= 64 ? 4 : (int)(width - d) / 16;
            product(h->scores + cells(call, j), padded, values + d, width, h->sums + d, width, rows, cells(call, deep),
                    1, wide, j > 0, call->half);
        }
    }
    for (int64_t i = 0; i < rows; i++) {
        int64_t row = start + i, query = row % call->queries;
        int64_t at = ((h->b * call->queries + query) * call->heads + head_of(h, row)) * call->value_depth;
        for (int64_t d = 0; d < call->value_depth; d += 16) {
            __m512 value = _mm512_mul_ps(_mm512_loadu_ps(h->sums + i * width + d), _mm512_set1_ps(inverse[i]));
            store(call->out, call->query.half, at + d, value, head16(call->value_depth - d));
        }
    }
}

/* A share of the blocks of one head; 0, or 1 where memory is short. */
static int head(const Call *call, int64_t b, int64_t kv, int64_t share, int64_t shares) {
    int64_t rows = call->groups * call->queries, blocks = (rows + BLOCK - 1) / BLOCK;
    Head h = { call, b, kv, up(call->keys, PANEL), up(call->value_depth, 16), blocks == 1 };
    int64_t depth = cells(call, call->depth), keys = (h.once ? PANEL : h.padded) * depth;
    int64_t values = cells(call, h.once ? CHUNK : call->keys) * h.width;
    int64_t size = keys + values + BLOCK * (h.padded + depth + h.width);
    h.panels = aligned_alloc(64, up(size * sizeof(float), 64));
    if (!h.panels) return 1;
    h.values = h.panels + keys, h.scores = h.values + values;
    h.sums = h.scores + BLOCK * h.padded, h.query = h.sums + BLOCK * h.width;
    if (!h.once) {
        for (int64_t j = 0; j < call->keys; j += PANEL)
            pack_keys(call, b * call->k.batch + kv * call->k.head, j, h.panels + j * depth);
        pack_values(call, b * call->v.batch + kv * call->v.head, 0, call->keys, h.values, h.width);
    }
    for (int64_t i = share; i < blocks; i += shares)
        block(&h, i * BLOCK, rows - i * BLOCK < BLOCK ? rows - i * BLOCK : BLOCK);
    free(h.panels);
    return 0;
}

int takes_half(void) {
#ifdef __AVX512BF16__
    return 1;
#else
    return 0;
#endif
}

int attention(const Call *call) {
    int64_t kv_heads = call->heads / call->groups, jobs = call->batch * kv_heads;
    /* Few heads are shared among threads; each packs the keys for itself. */
    int64_t shares = jobs >= 8 ? 1 : call->queries * call->groups >= 8 * BLOCK ? 4 : 1;
    int failed = 0;
    #pragma omp parallel for schedule(dynamic) reduction(|:failed) if (jobs * shares > 1)
    for (int64_t job = 0; job < jobs * shares; job++)
        failed |= head(call, job / shares / kv_heads, job / shares % kv_heads, job % shares, shares);
    return failed;
}
"""
