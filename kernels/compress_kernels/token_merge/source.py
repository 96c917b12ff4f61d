"""The C source of token merging, on top of what our kernels share: matching, partial order and means in one call."""

SOURCE = r"""
#include <string.h>

#define PANEL 64  /* tokens of a panel: four registers */
#define BLOCK 24  /* tokens whose likeness to a panel is computed at a time */

typedef struct {
    Floats x, metric;               /* [batch, tokens, width] and [batch, tokens, depth], contiguous */
    void *out;                      /* [batch, left, width], of the kind of x */
    const float *size; float *sizes; /* [batch, tokens] before and [batch, left] after */
    int64_t *kept, *gone, *slot;    /* [batch, left], [batch, r], [batch, tokens] */
    const uint8_t *fixed; int64_t fixed_row; /* [batch or 1, tokens]: take no part */
    const uint8_t *alive;           /* [batch, tokens]: no padding; or nothing */
    const int64_t *rows;            /* [batch]: how many of each row go, where there is padding; or nothing */
    int64_t batch, tokens, width, depth, r;
    int32_t euclidean; float ward;
    const float *price;             /* [batch, tokens]: the cost of a pair is multiplied by both; or nothing */
} Call;

typedef struct { float cost; int32_t at, target; } Proposal;

static int cheaper(const void *one, const void *two) {
    const Proposal *a = one, *b = two;
    return a->cost < b->cost ? -1 : a->cost > b->cost ? 1 : a->at - b->at;
}

/* The metric of one token as floats, for cosines of length one; returns its squared length before that. */
static float unit(const Call *call, int64_t b, int64_t token, float *to) {
    __m512 sum = _mm512_setzero_ps();
    int64_t at = (b * call->tokens + token) * call->depth;
    for (int64_t d = 0; d < call->depth; d += 16) {
        __mmask16 inside = head16(call->depth - d);
        __m512 value = load(call->metric, at + d, inside);
        sum = _mm512_fmadd_ps(value, value, sum);
        _mm512_mask_storeu_ps(to + d, inside, value);
    }
    float length = _mm512_reduce_add_ps(sum), norm = sqrtf(length);
    float factor = call->euclidean ? 1 : 1 / (norm > 1e-12f ? norm : 1e-12f);
    for (int64_t d = 0; d < call->depth; d++) to[d] *= factor;
    return length;
}

/* [count, depth] -> panels of [depth, PANEL], zeros beyond the last */
static void pack(const float *rows, int64_t count, int64_t depth, float *panels) {
    for (int64_t j = 0; j < up(count, PANEL); j += 16)
        for (int64_t d = 0; d < depth; d += 16) {
            float *panel = panels + j / PANEL * PANEL * depth + j % PANEL;
            __m512i row[16];
            for (int i = 0; i < 16; i++)
                row[i] = _mm512_maskz_loadu_epi32(j + i < count ? head16(depth - d) : 0, rows + (j + i) * depth + d);
            transpose(row);
            for (int64_t i = 0; i < least(16, depth - d); i++) _mm512_storeu_si512(panel + (d + i) * PANEL, row[i]);
        }
}

/* What sizes from 1 on multiply the cost of sixteen pairs by: a power of their harmonic mean. */
INLINE __m512 weights(const Call *call, __m512 one, __m512 other) {
    __m512 mean = _mm512_div_ps(_mm512_mul_ps(_mm512_add_ps(one, one), other), _mm512_add_ps(one, other));
    if (call->ward == 0.5f) return _mm512_sqrt_ps(mean);
    float values[16];
    _mm512_storeu_ps(values, mean);
    for (int i = 0; i < 16; i++) values[i] = powf(values[i], call->ward);
    return _mm512_loadu_ps(values);
}

/* The right tokens beside their metric; beyond the last, and where they take no part, the bar is infinite. */
typedef struct { float *length, *size, *bar, *price; } Right;

/* The cheapest partner of one left token, the first of equal ones. */
static Proposal propose(
    const Call *call, int64_t at, const float *dots, float length, float size, float price, Right right
) {
    __m512 best = _mm512_set1_ps(INFINITY), own = _mm512_set1_ps(size > 1 ? size : 1);
    __m512i index = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15), target = index;
    for (int64_t j = 0; j < call->tokens / 2; j += 16) {
        __m512 dot = _mm512_loadu_ps(dots + j), cost = _mm512_sub_ps(_mm512_set1_ps(1), dot);
        if (call->euclidean) {
            __m512 both = _mm512_add_ps(_mm512_set1_ps(length), _mm512_loadu_ps(right.length + j));
            cost = _mm512_fnmadd_ps(_mm512_set1_ps(2), dot, both);
        }
        if (call->ward != 0) cost = _mm512_mul_ps(cost, weights(call, own, _mm512_loadu_ps(right.size + j)));
        if (call->price)
            cost = _mm512_mul_ps(cost, _mm512_mul_ps(_mm512_set1_ps(price), _mm512_loadu_ps(right.price + j)));
        cost = _mm512_add_ps(cost, _mm512_loadu_ps(right.bar + j));
        __mmask16 less = _mm512_cmp_ps_mask(cost, best, _CMP_LT_OQ);
        best = _mm512_mask_mov_ps(best, less, cost);
        target = _mm512_mask_mov_epi32(target, less, _mm512_add_epi32(index, _mm512_set1_epi32((int)j)));
    }
    float least = _mm512_reduce_min_ps(best);
    __mmask16 equal = _mm512_cmp_ps_mask(best, _mm512_set1_ps(least), _CMP_EQ_OQ);
    Proposal found = { least, (int32_t)at, least == INFINITY ? 0 : _mm512_mask_reduce_min_epi32(equal, target) };
    return found;
}

/* Proposals of one row of the batch, the cheapest first. */
static void matched(const Call *call, int64_t b, float *scratch, Proposal *found) {
    int64_t count = call->tokens / 2, lefts = call->tokens - count, depth = call->depth, padded = up(count, PANEL);
    float *panels = scratch, *rows = panels + padded * depth, *dots = rows + (count > BLOCK ? count : BLOCK) * depth;
    float *beside = dots + BLOCK * padded;
    Right right = { beside, beside + padded, beside + 2 * padded, beside + 3 * padded };
    const uint8_t *fixed = call->fixed + b * call->fixed_row;
    const float *size = call->size + b * call->tokens, *price = call->price ? call->price + b * call->tokens : 0;
    for (int64_t j = 0; j < padded; j++) {
        int here = j < count;
        right.length[j] = here ? unit(call, b, 2 * j + 1, rows + j * depth) : 0;
        right.size[j] = here && size[2 * j + 1] > 1 ? size[2 * j + 1] : 1;
        right.price[j] = here && price ? price[2 * j + 1] : 1;
        right.bar[j] = here && !fixed[2 * j + 1] ? 0 : INFINITY;
    }
    pack(rows, count, depth, panels);
    for (int64_t i = 0; i < lefts; i += BLOCK) {
        int64_t own = least(BLOCK, lefts - i);
        float length[BLOCK];
        for (int64_t k = 0; k < own; k++) length[k] = unit(call, b, 2 * (i + k), rows + k * depth);
        for (int64_t j = 0; j < padded; j += PANEL)
            product(rows, depth, panels + j * depth, PANEL, dots + j, padded, own, depth, 1, 4, 0, 0);
        for (int64_t k = 0; k < own; k++) {
            float own_price = price ? price[2 * (i + k)] : 1;
            found[i + k] = propose(call, i + k, dots + k * padded, length[k], size[2 * (i + k)], own_price, right);
            if (fixed[2 * (i + k)]) found[i + k].cost = INFINITY;
        }
    }
    qsort(found, lefts, sizeof(Proposal), cheaper);
}

/* Who goes and stays, and where each token is found. */
static void arrange(const Call *call, int64_t b, const Proposal *found, uint8_t *goes, int32_t *into) {
    int64_t tokens = call->tokens, r = call->r, own = call->rows ? call->rows[b] : r, padding = 0, place = 0;
    int64_t *gone = call->gone + b * r, *slot = call->slot + b * tokens, *kept = call->kept + b * (tokens - r);
    memset(goes, 0, tokens);
    for (int64_t i = 0; i < own; i++) gone[i] = 2 * found[i].at;
    for (int64_t i = own; i < r; padding++) /* the rest of a padded row goes from its padding */
        if (!call->alive[b * tokens + padding]) gone[i++] = padding;
    for (int64_t i = 0; i < r; i++) goes[gone[i]] = 1;
    for (int64_t i = 0; i < tokens; i++) {
        slot[i] = place > 0 && goes[i] ? place - 1 : place;
        if (!goes[i]) kept[place++] = i;
    }
    for (int64_t i = 0; i < r; i++) into[i] = (int32_t)slot[2 * found[i].target + 1];
    for (int64_t i = 0; i < r; i++) slot[gone[i]] = into[i];
}

/* The size-weighted means; tokens that none joined stay to the bit. */
static void means(const Call *call, int64_t b, float *sums, int32_t *place) {
    int64_t tokens = call->tokens, width = call->width, left = tokens - call->r, used = 0;
    const int64_t *gone = call->gone + b * call->r, *slot = call->slot + b * tokens, *kept = call->kept + b * left;
    const float *size = call->size + b * tokens;
    float *after = call->sizes + b * left;
    for (int64_t i = 0; i < left; i++) after[i] = size[kept[i]], place[i] = -1;
    for (int64_t i = 0; i < call->r; i++) {
        float own = size[gone[i]];
        int64_t to = slot[gone[i]];
        if (own <= 0) continue; /* padding may hold anything */
        if (place[to] < 0) {
            place[to] = (int32_t)used++;
            for (int64_t d = 0; d < width; d += 16) {
                __mmask16 inside = head16(width - d);
                __m512 value = load(call->x, (b * tokens + kept[to]) * width + d, inside);
                value = _mm512_mul_ps(value, _mm512_set1_ps(after[to]));
                _mm512_mask_storeu_ps(sums + place[to] * width + d, inside, value);
            }
        }
        after[to] += own;
        for (int64_t d = 0; d < width; d += 16) {
            __mmask16 inside = head16(width - d);
            float *sum = sums + place[to] * width + d;
            __m512 value = load(call->x, (b * tokens + gone[i]) * width + d, inside);
            __m512 more = _mm512_fmadd_ps(value, _mm512_set1_ps(own), _mm512_maskz_loadu_ps(inside, sum));
            _mm512_mask_storeu_ps(sum, inside, more);
        }
    }
    for (int64_t i = 0; i < left; i++)
        for (int64_t d = 0; d < width; d += 16) {
            __mmask16 inside = head16(width - d);
            __m512 value = load(call->x, (b * tokens + kept[i]) * width + d, inside);
            if (place[i] >= 0)
                value = _mm512_div_ps(_mm512_maskz_loadu_ps(inside, sums + place[i] * width + d),
                                      _mm512_set1_ps(after[i] < 1 ? 1 : after[i]));
            store(call->out, call->x.half, (b * left + i) * width + d, value, inside);
        }
}

static int row(const Call *call, int64_t b) {
    int64_t count = call->tokens / 2, lefts = call->tokens - count, padded = up(count, PANEL);
    int64_t floats = (padded + (count > BLOCK ? count : BLOCK)) * call->depth + (BLOCK + 4) * padded;
    int64_t sums = call->r * call->width;
    floats = floats > sums ? floats : sums; /* matching is over when means are made */
    char *memory = aligned_alloc(64, up(floats * 4 + lefts * sizeof(Proposal) + call->tokens * 5 + 256, 64));
    if (!memory) return 1;
    Proposal *found = (Proposal *)(memory + up(floats * 4, 64));
    int32_t *place = (int32_t *)(found + lefts);
    uint8_t *goes = (uint8_t *)(place + call->tokens);
    matched(call, b, (float *)memory, found);
    arrange(call, b, found, goes, place);
    means(call, b, (float *)memory, place);
    free(memory);
    return 0;
}

int token_merge(const Call *call) {
    int failed = 0;
    #pragma omp parallel for schedule(dynamic) reduction(|:failed) if (call->batch > 1)
    for (int64_t b = 0; b < call->batch; b++) failed |= row(call, b);
    return failed;
}
"""
