/* What training computes between its matrix products, on a CPU in bf16: fastpath/kernels.py calls this where model.py would
   take several passes over memory for what needs one.

   A row is read, computed in float32 and rounded to bfloat16 once. Widths come in multiples of 16, but for rows of
   scores and logits. Threads share the rows, each a run of them, so that the same number of threads gives the same sums. */

#include <math.h>
#include <stddef.h>

#include "simd.h"

#ifdef _OPENMP
#include <omp.h>
#else /* a compiler without OpenMP: one thread */
static int omp_get_thread_num(void) { return 0; }
#endif

static inline void store_float32(float *p, floats x) { memcpy(p, &x, sizeof x); }

static inline void store_bfloat16(uint16_t *p, floats x) { /* to the nearest, ties to even; what is no number stays none */
    words bits = (words)x, none = (words)(x != x), rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    halves y = __builtin_convertvector((rounded & ~none) | (0x7fc0 & none), halves);
    memcpy(p, &y, sizeof y);
}

/* The end of a row whose width is no multiple of 16: the first n of 16, the others `fill`. */
enum { ZERO = 0, MINUS_INFINITY = 0xff80 };
static inline floats load_end(const uint16_t *p, int n, uint16_t fill) {
    uint16_t x[LANES];
    for (int i = 0; i < LANES; i++) x[i] = i < n ? p[i] : fill;
    return load_bfloat16(x);
}

static inline void store_end(uint16_t *p, floats x, int n) {
    uint16_t y[LANES];
    store_bfloat16(y, x);
    memcpy(p, y, n * sizeof *p);
}

static inline floats choose(ints mask, floats yes, floats no) { return (floats)((mask & (ints)yes) | (~mask & (ints)no)); }

static inline floats larger(floats a, floats b) { return choose(a > b, a, b); }

static inline float largest(floats x) {
    float found = x[0];
    for (int i = 1; i < LANES; i++) found = x[i] > found ? x[i] : found;
    return found;
}

static inline float sum(floats x) {
    float total = 0;
    for (int i = 0; i < LANES; i++) total += x[i];
    return total;
}

/* exp(x) to 2 in the last place, as 2^n · exp(r) with r in ±ln(2)/2, of x between -87 (1e-38, near enough to 0) and 88; what
   lies beyond is taken for these. What is no number stays none. The polynomial is that of Cephes (Moshier 1989, expf). */
static inline floats exponential(floats x) {
    const floats least = (floats){0} - 87, most = (floats){0} + 88, round = (floats){0} + 12582912; /* 1.5 · 2^23 */
    x = choose(x < least, least, choose(x > most, most, x));
    floats n = (x * 1.44269504f + round) - round, r = x - n * 0.693359375f + n * 2.12194440e-4f;
    floats p = 1.9875691500e-4f * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1;
    return (floats)((ints)p + (__builtin_convertvector(n, ints) << 23));
}

/* ---------------------------------------------------------------------------------------------
   RMSNorm: training.RMSNormFunction */

static inline floats load(const void *x, int is_bfloat16, int64_t i) {
    return is_bfloat16 ? load_bfloat16((const uint16_t *)x + i) : load_float32((const float *)x + i);
}

/* y (rows, C) = x r · weight, and r (rows,) = 1 / rms(x). */
void normalise(const void *x, int is_bfloat16, const float *weight, float eps, int64_t rows, int C, uint16_t *y, float *r,
               int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t row = 0; row < rows; row++) {
        int64_t first = row * C;
        floats squares = {0};
        for (int i = 0; i < C; i += LANES) {
            floats a = load(x, is_bfloat16, first + i);
            squares += a * a;
        }
        r[row] = 1 / sqrtf(sum(squares) / C + eps);
        for (int i = 0; i < C; i += LANES)
            store_bfloat16(y + first + i, load_float32(weight + i) * (load(x, is_bfloat16, first + i) * r[row]));
    }
}

/* ∂x (rows, C) in x's type, and each thread's part of ∂weight: (threads, C), zero before. */
void normalise_gradient(const void *x, int is_bfloat16, const float *weight, const float *r, const uint16_t *grad_y,
                        int64_t rows, int C, void *grad_x, float *grad_weight, int threads) {
#pragma omp parallel num_threads(threads)
    {
        float *mine = grad_weight + (int64_t)C * omp_get_thread_num();
#pragma omp for schedule(static)
        for (int64_t row = 0; row < rows; row++) {
            int64_t first = row * C;
            floats dot = {0};
            for (int i = 0; i < C; i += LANES) {
                floats part = load_bfloat16(grad_y + first + i) * (load(x, is_bfloat16, first + i) * r[row]);
                store_float32(mine + i, load_float32(mine + i) + part);
                dot += part * load_float32(weight + i);
            }
            float mean = sum(dot) / C;
            for (int i = 0; i < C; i += LANES) {
                floats unit = load(x, is_bfloat16, first + i) * r[row];
                floats grad = (load_bfloat16(grad_y + first + i) * load_float32(weight + i) - unit * mean) * r[row];
                if (is_bfloat16)
                    store_bfloat16((uint16_t *)grad_x + first + i, grad);
                else
                    store_float32((float *)grad_x + first + i, grad);
            }
        }
    }
}

/* ---------------------------------------------------------------------------------------------
   SwiGLU: training.GatedSiLU */

/* y (rows, F) = silu(gate) · up of gate and up (rows, 2F). */
void gated_silu(const uint16_t *gate_up, int64_t rows, int F, uint16_t *y, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t row = 0; row < rows; row++)
        for (int i = 0; i < F; i += LANES) {
            floats gate = load_bfloat16(gate_up + row * 2 * F + i), up = load_bfloat16(gate_up + row * 2 * F + F + i);
            store_bfloat16(y + row * F + i, gate / (1 + exponential(-gate)) * up);
        }
}

void gated_silu_gradient(const uint16_t *gate_up, const uint16_t *grad_y, int64_t rows, int F, uint16_t *grad, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t row = 0; row < rows; row++)
        for (int i = 0; i < F; i += LANES) {
            floats gate = load_bfloat16(gate_up + row * 2 * F + i), up = load_bfloat16(gate_up + row * 2 * F + F + i);
            floats dy = load_bfloat16(grad_y + row * F + i), sigmoid = 1 / (1 + exponential(-gate));
            store_bfloat16(grad + row * 2 * F + i, dy * up * sigmoid * (1 + gate * (1 - sigmoid)));
            store_bfloat16(grad + row * 2 * F + F + i, dy * gate * sigmoid);
        }
}

/* ---------------------------------------------------------------------------------------------
   packed attention, the matmuls apart */

/* Heads of tokens that lie in a packed buffer, `stride` numbers from token to token, brought together as rows: of each
   document and each of the heads / group key/value heads (length · group, D), a token's heads that share one after the
   other. Documents shorter than `length` are filled up with zeros. With cos and sin (tokens, D) also rotated
   (model.apply_rotary); without, they are NULL. */
void pack_heads(const uint16_t *buffer, int64_t stride, int heads, int group, int D, const int32_t *starts,
                const int32_t *lengths, int documents, int length, const uint16_t *cos, const uint16_t *sin,
                uint16_t *rows, int threads) {
    const int half = D / 2;
#pragma omp parallel for collapse(2) schedule(static) num_threads(threads)
    for (int d = 0; d < documents; d++)
        for (int t = 0; t < length; t++)
            for (int h = 0; h < heads; h++) {
                uint16_t *to = rows + ((((int64_t)d * (heads / group) + h / group) * length + t) * group + h % group) * D;
                int64_t token = (int64_t)starts[d] + t;
                const uint16_t *from = buffer + token * stride + (int64_t)h * D;
                if (t >= lengths[d])
                    memset(to, 0, D * sizeof *to);
                else if (!cos)
                    memcpy(to, from, D * sizeof *to);
                else
                    for (int i = 0; i < half; i += LANES) {
                        floats a = load_bfloat16(from + i), b = load_bfloat16(from + half + i);
                        floats c = load_bfloat16(cos + token * D + i), s = load_bfloat16(sin + token * D + i);
                        store_bfloat16(to + i, a * c - b * s);
                        store_bfloat16(to + half + i, b * c + a * s);
                    }
            }
}

/* The way back, without what was filled up, and rotated back: with pack_heads' arguments, its gradient. */
void unpack_heads(uint16_t *buffer, int64_t stride, int heads, int group, int D, const int32_t *starts,
                  const int32_t *lengths, int documents, int length, const uint16_t *cos, const uint16_t *sin,
                  const uint16_t *rows, int threads) {
    const int half = D / 2;
#pragma omp parallel for collapse(2) schedule(static) num_threads(threads)
    for (int d = 0; d < documents; d++)
        for (int t = 0; t < length; t++)
            for (int h = 0; h < heads && t < lengths[d]; h++) {
                const uint16_t *from =
                    rows + ((((int64_t)d * (heads / group) + h / group) * length + t) * group + h % group) * D;
                int64_t token = (int64_t)starts[d] + t;
                uint16_t *to = buffer + token * stride + (int64_t)h * D;
                if (!cos)
                    memcpy(to, from, D * sizeof *to);
                else
                    for (int i = 0; i < half; i += LANES) {
                        floats a = load_bfloat16(from + i), b = load_bfloat16(from + half + i);
                        floats c = load_bfloat16(cos + token * D + i), s = load_bfloat16(sin + token * D + i);
                        store_bfloat16(to + i, a * c + b * s);
                        store_bfloat16(to + half + i, b * c - a * s);
                    }
            }
}

/* softmax(scale · scores) in place, (batch, rows, columns): row r, of the query `first` + r / group, over the keys up to
   that one; the others get 0. */
void causal_softmax(uint16_t *scores, int batch, int rows, int columns, int first, int group, float scale, int threads) {
#pragma omp parallel for collapse(2) schedule(static) num_threads(threads)
    for (int b = 0; b < batch; b++)
        for (int r = 0; r < rows; r++) {
            uint16_t *p = scores + ((int64_t)b * rows + r) * columns;
            int n = first + r / group + 1, whole = n / LANES * LANES;
            floats end = load_end(p + whole, n - whole, MINUS_INFINITY), high = end, total = {0};
            for (int i = 0; i < whole; i += LANES) high = larger(high, load_bfloat16(p + i));
            float highest = largest(high);
            for (int i = 0; i < whole; i += LANES) total += exponential((load_bfloat16(p + i) - highest) * scale);
            end = exponential((end - highest) * scale);
            float share = 1 / sum(total + end);
            for (int i = 0; i < whole; i += LANES)
                store_bfloat16(p + i, exponential((load_bfloat16(p + i) - highest) * scale) * share);
            store_end(p + whole, end * share, n - whole);
            memset(p + n, 0, (columns - n) * sizeof *p);
        }
}

/* ∂probabilities become ∂scores in place. */
void causal_softmax_gradient(const uint16_t *probabilities, uint16_t *grad, int batch, int rows, int columns, int first,
                             int group, float scale, int threads) {
#pragma omp parallel for collapse(2) schedule(static) num_threads(threads)
    for (int b = 0; b < batch; b++)
        for (int r = 0; r < rows; r++) {
            const uint16_t *p = probabilities + ((int64_t)b * rows + r) * columns;
            uint16_t *g = grad + ((int64_t)b * rows + r) * columns;
            int n = first + r / group + 1, whole = n / LANES * LANES;
            floats p_end = load_end(p + whole, n - whole, ZERO), g_end = load_end(g + whole, n - whole, ZERO);
            floats products = p_end * g_end;
            for (int i = 0; i < whole; i += LANES) products += load_bfloat16(p + i) * load_bfloat16(g + i);
            float dot = sum(products);
            for (int i = 0; i < whole; i += LANES)
                store_bfloat16(g + i, load_bfloat16(p + i) * (load_bfloat16(g + i) - dot) * scale);
            store_end(g + whole, p_end * (g_end - dot) * scale, n - whole);
            memset(g + n, 0, (columns - n) * sizeof *g);
        }
}

/* ---------------------------------------------------------------------------------------------
   the loss: training.LinearCrossEntropy, the products apart */

/* losses (N,) in nats of softmax(logits (N, V)); with weights (N,) the logits become the weighted sum's ∂logits. */
void cross_entropy(uint16_t *logits, const int64_t *targets, const float *weights, int64_t N, int V, float *losses,
                   int threads) {
    const int whole = V / LANES * LANES;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t row = 0; row < N; row++) {
        uint16_t *p = logits + row * V, *of_target = p + targets[row];
        floats end = load_end(p + whole, V - whole, MINUS_INFINITY), high = end, total = {0};
        for (int i = 0; i < whole; i += LANES) high = larger(high, load_bfloat16(p + i));
        float highest = largest(high), logit = load_end(of_target, 1, ZERO)[0];
        for (int i = 0; i < whole; i += LANES) total += exponential(load_bfloat16(p + i) - highest);
        end = exponential(end - highest);
        float all = sum(total + end);
        losses[row] = highest + logf(all) - logit;
        if (!weights) continue;
        float share = weights[row] / all;
        for (int i = 0; i < whole; i += LANES)
            store_bfloat16(p + i, exponential(load_bfloat16(p + i) - highest) * share);
        store_end(p + whole, end * share, V - whole);
        /* from float32, since a probability near 1 leaves little of it when 1 is taken away */
        store_end(of_target, (floats){0} + (expf(logit - highest) * share - weights[row]), 1);
    }
}
