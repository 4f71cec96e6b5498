/* Fused operations for bf16 training on a CPU: what the network computes between matmuls, in one pass over memory where
   model.py takes several. fastpath/kernels.py calls them.

   Each row is computed in float32 and rounded to bfloat16 once. Widths are multiples of 16, except those of scores and
   logits. Each thread takes a contiguous range of rows, so that sums are reproducible for a given number of threads. */

#include <math.h>
#include <stddef.h>

#include "simd.h"

#ifdef _OPENMP
#include <omp.h>
#else /* a compiler without OpenMP: one thread */
static int omp_get_thread_num(void) { return 0; }
#endif

/* The tail of a row whose width is not a multiple of 16: n numbers, the rest set to `fill`. */
enum { ZERO = 0, MINUS_INFINITY = 0xff80 };
static inline f32x16 load_tail(const uint16_t *p, int n, uint16_t fill) {
    uint16_t x[LANES];
    for (int i = 0; i < LANES; i++) x[i] = i < n ? p[i] : fill;
    return load_bfloat16(x);
}

static inline void store_tail(uint16_t *p, f32x16 x, int n) {
    uint16_t y[LANES];
    store_bfloat16(y, x);
    memcpy(p, y, n * sizeof *p);
}

static inline f32x16 maximum(f32x16 a, f32x16 b) { return blend(a > b, a, b); }

static inline float reduce_max(f32x16 x) {
    float found = x[0];
    for (int i = 1; i < LANES; i++) found = x[i] > found ? x[i] : found;
    return found;
}

static inline float reduce_sum(f32x16 x) {
    float total = 0;
    for (int i = 0; i < LANES; i++) total += x[i];
    return total;
}

/* ---------------------------------------------------------------------------------------------
   RMSNorm */

static inline f32x16 load(const void *x, int is_bfloat16, int64_t i) {
    return is_bfloat16 ? load_bfloat16((const uint16_t *)x + i) : load_float32((const float *)x + i);
}

/* y (rows, C) = x r · weight and r (rows,) = 1 / rms(x). */
void rms_norm(const void *x, int is_bfloat16, const float *weight, float eps, int64_t rows, int C, uint16_t *y, float *r,
               int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t row = 0; row < rows; row++) {
        int64_t first = row * C;
        f32x16 squares = {0};
        for (int i = 0; i < C; i += LANES) {
            f32x16 a = load(x, is_bfloat16, first + i);
            squares += a * a;
        }
        r[row] = 1 / sqrtf(reduce_sum(squares) / C + eps);
        for (int i = 0; i < C; i += LANES)
            store_bfloat16(y + first + i, load_float32(weight + i) * (load(x, is_bfloat16, first + i) * r[row]));
    }
}

/* Gradients: grad_x (rows, C) in the type of x; grad_weight (threads, C), zero before the call, has one partial sum per
   thread. */
void rms_norm_backward(const void *x, int is_bfloat16, const float *weight, const float *r, const uint16_t *grad_y,
                        int64_t rows, int C, void *grad_x, float *grad_weight, int threads) {
#pragma omp parallel num_threads(threads)
    {
        float *mine = grad_weight + (int64_t)C * omp_get_thread_num();
#pragma omp for schedule(static)
        for (int64_t row = 0; row < rows; row++) {
            int64_t first = row * C;
            f32x16 dot = {0};
            for (int i = 0; i < C; i += LANES) {
                f32x16 part = load_bfloat16(grad_y + first + i) * (load(x, is_bfloat16, first + i) * r[row]);
                store_float32(mine + i, load_float32(mine + i) + part);
                dot += part * load_float32(weight + i);
            }
            float mean = reduce_sum(dot) / C;
            for (int i = 0; i < C; i += LANES) {
                f32x16 unit = load(x, is_bfloat16, first + i) * r[row];
                f32x16 grad = (load_bfloat16(grad_y + first + i) * load_float32(weight + i) - unit * mean) * r[row];
                if (is_bfloat16)
                    store_bfloat16((uint16_t *)grad_x + first + i, grad);
                else
                    store_float32((float *)grad_x + first + i, grad);
            }
        }
    }
}

/* ---------------------------------------------------------------------------------------------
   SwiGLU */

/* y (rows, F) = silu(gate) · up, where a row of gate_up (rows, 2F) is gate, then up. */
void gated_silu(const uint16_t *gate_up, int64_t rows, int F, uint16_t *y, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t row = 0; row < rows; row++)
        for (int i = 0; i < F; i += LANES) {
            f32x16 gate = load_bfloat16(gate_up + row * 2 * F + i), up = load_bfloat16(gate_up + row * 2 * F + F + i);
            store_bfloat16(y + row * F + i, gate / (1 + exp_f32x16(-gate)) * up);
        }
}

void gated_silu_backward(const uint16_t *gate_up, const uint16_t *grad_y, int64_t rows, int F, uint16_t *grad, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t row = 0; row < rows; row++)
        for (int i = 0; i < F; i += LANES) {
            f32x16 gate = load_bfloat16(gate_up + row * 2 * F + i), up = load_bfloat16(gate_up + row * 2 * F + F + i);
            f32x16 dy = load_bfloat16(grad_y + row * F + i), sigmoid = 1 / (1 + exp_f32x16(-gate));
            store_bfloat16(grad + row * 2 * F + i, dy * up * sigmoid * (1 + gate * (1 - sigmoid)));
            store_bfloat16(grad + row * 2 * F + F + i, dy * gate * sigmoid);
        }
}

/* ---------------------------------------------------------------------------------------------
   packed attention, except its matmuls */

/* Gathers the heads of a packed buffer, whose tokens are `stride` numbers apart, into `rows`: (length · group, D) for each
   document and each of the heads / group key/value heads. The `group` heads of a token that share a key/value head are
   adjacent. Documents shorter than `length` are padded with zeros. Applies RoPE (model.apply_rotary) with cos and sin
   (tokens, D); none if these are NULL. */
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
                        f32x16 a = load_bfloat16(from + i), b = load_bfloat16(from + half + i);
                        f32x16 c = load_bfloat16(cos + token * D + i), s = load_bfloat16(sin + token * D + i);
                        store_bfloat16(to + i, a * c - b * s);
                        store_bfloat16(to + half + i, b * c + a * s);
                    }
            }
}

/* The inverse of pack_heads, with the same arguments: scatters without the padding and rotates back. It is also the
   gradient of pack_heads. */
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
                        f32x16 a = load_bfloat16(from + i), b = load_bfloat16(from + half + i);
                        f32x16 c = load_bfloat16(cos + token * D + i), s = load_bfloat16(sin + token * D + i);
                        store_bfloat16(to + i, a * c + b * s);
                        store_bfloat16(to + half + i, b * c - a * s);
                    }
            }
}

/* softmax(scale · scores) in place on (batch, rows, columns), causal: row r is the query `first` + r / group. Later keys
   get probability 0. */
void causal_softmax(uint16_t *scores, int batch, int rows, int columns, int first, int group, float scale, int threads) {
#pragma omp parallel for collapse(2) schedule(static) num_threads(threads)
    for (int b = 0; b < batch; b++)
        for (int r = 0; r < rows; r++) {
            uint16_t *p = scores + ((int64_t)b * rows + r) * columns;
            int n = first + r / group + 1, whole = n / LANES * LANES;
            f32x16 end = load_tail(p + whole, n - whole, MINUS_INFINITY), high = end, total = {0};
            for (int i = 0; i < whole; i += LANES) high = maximum(high, load_bfloat16(p + i));
            float highest = reduce_max(high);
            for (int i = 0; i < whole; i += LANES) total += exp_f32x16((load_bfloat16(p + i) - highest) * scale);
            end = exp_f32x16((end - highest) * scale);
            float inverse = 1 / reduce_sum(total + end);
            for (int i = 0; i < whole; i += LANES)
                store_bfloat16(p + i, exp_f32x16((load_bfloat16(p + i) - highest) * scale) * inverse);
            store_tail(p + whole, end * inverse, n - whole);
            memset(p + n, 0, (columns - n) * sizeof *p);
        }
}

/* Turns the gradient of the probabilities into that of the scores, in place. */
void causal_softmax_backward(const uint16_t *probabilities, uint16_t *grad, int batch, int rows, int columns, int first,
                             int group, float scale, int threads) {
#pragma omp parallel for collapse(2) schedule(static) num_threads(threads)
    for (int b = 0; b < batch; b++)
        for (int r = 0; r < rows; r++) {
            const uint16_t *p = probabilities + ((int64_t)b * rows + r) * columns;
            uint16_t *g = grad + ((int64_t)b * rows + r) * columns;
            int n = first + r / group + 1, whole = n / LANES * LANES;
            f32x16 p_end = load_tail(p + whole, n - whole, ZERO), g_end = load_tail(g + whole, n - whole, ZERO);
            f32x16 sums = p_end * g_end;
            for (int i = 0; i < whole; i += LANES) sums += load_bfloat16(p + i) * load_bfloat16(g + i);
            float dot = reduce_sum(sums);
            for (int i = 0; i < whole; i += LANES)
                store_bfloat16(g + i, load_bfloat16(p + i) * (load_bfloat16(g + i) - dot) * scale);
            store_tail(g + whole, p_end * (g_end - dot) * scale, n - whole);
            memset(g + n, 0, (columns - n) * sizeof *g);
        }
}

/* ---------------------------------------------------------------------------------------------
   cross-entropy, except its matmuls */

/* losses (N,) in nats of softmax(logits (N, V)). With weights (N,), the logits are replaced by their gradient of the weighted
   sum of the losses. */
void cross_entropy(uint16_t *logits, const int64_t *targets, const float *weights, int64_t N, int V, float *losses,
                   int threads) {
    const int whole = V / LANES * LANES;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t row = 0; row < N; row++) {
        uint16_t *p = logits + row * V, *target_logit = p + targets[row];
        f32x16 end = load_tail(p + whole, V - whole, MINUS_INFINITY), high = end, total = {0};
        for (int i = 0; i < whole; i += LANES) high = maximum(high, load_bfloat16(p + i));
        float highest = reduce_max(high), logit = load_tail(target_logit, 1, ZERO)[0];
        for (int i = 0; i < whole; i += LANES) total += exp_f32x16(load_bfloat16(p + i) - highest);
        end = exp_f32x16(end - highest);
        float all = reduce_sum(total + end);
        losses[row] = highest + logf(all) - logit;
        if (!weights) continue;
        float factor = weights[row] / all;
        for (int i = 0; i < whole; i += LANES)
            store_bfloat16(p + i, exp_f32x16(load_bfloat16(p + i) - highest) * factor);
        store_tail(p + whole, end * factor, V - whole);
        /* in float32: with a probability near 1, probability - 1 would cancel in bfloat16 */
        store_tail(target_logit, (f32x16){0} + (expf(logit - highest) * factor - weights[row]), 1);
    }
}
