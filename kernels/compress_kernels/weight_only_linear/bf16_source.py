"""The C that works on the weight in bf16: 4 rows of it at a time, or all of it for torch's product."""

BFLOATS = r"""
// A weight row in bf16, up to the end of its last chunk.
INLINE void dense(const Layer *l, i64 n, uint16_t *out, int bits) {
    const int size = 8 * (bits ? bits : l->bits);
    float scale[16], zero[16];
    for (i64 c = 0; c < l->C; c++, out += 64) {
        if (c % 4 == 0) {  // 16 units of 16 inputs
            _mm512_storeu_ps(scale, unit_scales(l, n, c * 4));
            _mm512_storeu_ps(zero, _mm512_permutexvar_ps(loadi(l->groups + c * 4), zeros(l, n, base(l, c * 4))));
        }
        vi u = unpack(l, l->words + n * l->stride + c * size, bits, c < l->full ? size : l->rest);
        vf v[4];
        for (int i = 0; i < 4; i++) {
            v[i] = _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm512_castsi512_si128(u)));
            v[i] = _mm512_sub_ps(v[i], _mm512_set1_ps(zero[c % 4 * 4 + i]));
            v[i] = _mm512_mul_ps(v[i], _mm512_set1_ps(scale[c % 4 * 4 + i]));
            u = _mm512_alignr_epi32(u, u, 4);
        }
        _mm512_storeu_si512(out, (vi)_mm512_cvtne2ps_pbh(v[1], v[0]));
        _mm512_storeu_si512(out + 32, (vi)_mm512_cvtne2ps_pbh(v[3], v[2]));
    }
}

static void weights(i64 begin, i64 end, void *job) {
    const Layer *l = job;
    uint16_t row[l->C * 64];
    for (i64 n = begin; n < end; n++) {
        WIDTHS(dense, l, n, row);
        memcpy((uint16_t *)l->out + n * l->K, row, l->K * 2);
    }
}

// 4 weight rows times 4 rows of x, both in bf16.
static void square(const Layer *l, const uint16_t *rows, const uint16_t *x, float *out) {
    i64 K = l->C * 64;
    vf acc[4][4];
    for (int i = 0; i < 16; i++) acc[i / 4][i % 4] = _mm512_setzero_ps();
    for (i64 k = 0; k < K; k += 32) {
        vi w[4];
        for (int i = 0; i < 4; i++) w[i] = loadi(rows + i * K + k);
        for (int r = 0; r < 4; r++) {
            vi v = loadi(x + r * K + k);
            for (int i = 0; i < 4; i++) acc[r][i] = _mm512_dpbf16_ps(acc[r][i], (__m512bh)v, (__m512bh)w[i]);
        }
    }
    for (int r = 0; r < 4; r++) _mm_storeu_ps(out + r * 16, sums4(acc[r]));
}

static void squares(i64 begin, i64 end, void *job) {
    const Layer *l = job;
    i64 K = l->C * 64, R = parts(l->R, 4) * 4;
    uint16_t rows[4 * K];
    float out[R * 16];
    for (i64 n = begin * 16; n < end * 16; n += 16) {
        for (int i = 0; i < 16 && n + i < l->N; i += 4) {
            for (int j = 0; j < 4; j++) WIDTHS(dense, l, n + i + j < l->N ? n + i + j : l->N - 1, rows + j * K);
            for (i64 r = 0; r < R; r += 4) square(l, rows, l->halves + r * K, out + r * 16 + i);
        }
        for (i64 r = 0; r < l->R; r++) write(l, r, n, out + r * 16);
    }
}

static void halve(i64 begin, i64 end, void *job) {
    const Layer *l = job;
    i64 K = l->C * 64;
    for (i64 r = begin; r < end; r++)
        for (i64 k = 0; k < K; k += 16)
            _mm256_store_si256((__m256i *)(l->halves + r * K + k), (__m256i)_mm512_cvtneps_pbh(input(l, r, k)));
}

// Some rows: every weight is unpacked once for all of them.
static void some_rows(Layer *l) {
    i64 K = l->C * 64, R = parts(l->R, 4) * 4;
    int32_t groups[l->padded * 4];
    l->groups = groups, l->unit = 16;
    prepare(l, l->padded * 4);
    l->halves = aligned_alloc(64, R * K * 2);
    memset(l->halves + l->R * K, 0, (R - l->R) * K * 2);
    spread(l->R, l->K, halve, l);
    spread(parts(l->N, 16), 16 * l->K * l->R, squares, l);
    free(l->halves);
}
"""
