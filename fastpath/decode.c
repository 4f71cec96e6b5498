/* Computes the forward pass of one token on a CPU, to decode a single row.

   Decoding reads every weight once per token, so memory bandwidth limits its speed. From Python, the overhead of a hundred
   small operations costs about as much time as reading the weights; here one call does all of them.
   fastpath/native_decoder.py passes the weights and the key/value cache.

   Matrices (rows, columns) are row-major, in float32, in bfloat16, or in int8 with a scale for each row. Everything else is
   in float32, but that a vector which an int8 matrix multiplies is rounded to int16. The number of columns is a multiple of
   64. */

#include <math.h>
#include <stddef.h>

#include "simd.h"

enum { FLOAT32, BFLOAT16, INT8 };

typedef struct {
    const void *weights;
    const float *scale; /* (rows,) in int8, else NULL */
} Matrix;

typedef struct {
    const float *attention_norm, *q_norm, *k_norm, *mlp_norm; /* q_norm and k_norm: (D,) or NULL */
    Matrix q, k, v, o, gate, up, down;
} Layer;

typedef struct {
    int32_t dim, hidden, n_layers, n_heads, n_kv_heads, head_dim, vocab, matrix_type;
    float norm_eps;
    const float *embedding, *norm, *cos, *sin; /* (V, C), (C,), (S, D) and (S, D) */
    Matrix head;                               /* (V, C) */
} Model;

/* Threads split the rows of every matrix, and the heads. */
typedef struct {
    int thread, threads;
} Worker;

#ifdef _OPENMP
#include <omp.h>
static Worker this_worker(void) { return (Worker){omp_get_thread_num(), omp_get_num_threads()}; }
static inline void barrier(void) {
#pragma omp barrier
}
#else /* a compiler without OpenMP: one thread */
static Worker this_worker(void) { return (Worker){0, 1}; }
static inline void barrier(void) {}
#endif
static int range_begin(int n, Worker me) { return (int)((int64_t)n * me.thread / me.threads); }
static int range_end(int n, Worker me) { return (int)((int64_t)n * (me.thread + 1) / me.threads); }

/* y (rows,) = w (rows, columns) x, one row at a time, so that memory is read in order: four rows at once, as four streams,
   take twice as long. Four independent sums hide the latency of an addition. */
#define MATVEC(NAME, TYPE, LOAD)                                                                                       \
    static void NAME(const TYPE *w, const float *x, float *y, int rows, int columns) {                                 \
        for (int row = 0; row < rows; row++) {                                                                         \
            f32x16 a = {0}, b = {0}, c = {0}, d = {0};                                                                 \
            for (int i = 0; i < columns; i += 64, w += 64) {                                                           \
                for (size_t ahead = 8192; ahead < 8192 + 64 * sizeof *w; ahead += 64)                                  \
                    __builtin_prefetch((const char *)w + ahead);                                                       \
                a += LOAD(w) * load_float32(x + i), b += LOAD(w + 16) * load_float32(x + i + 16);                      \
                c += LOAD(w + 32) * load_float32(x + i + 32), d += LOAD(w + 48) * load_float32(x + i + 48);            \
            }                                                                                                          \
            a += b + (c + d);                                                                                          \
            y[row] = 0;                                                                                                \
            for (int i = 0; i < 16; i++) y[row] += a[i];                                                               \
        }                                                                                                              \
    }
MATVEC(matvec_float32, float, load_float32)
MATVEC(matvec_bfloat16, uint16_t, load_bfloat16)

/* Rounds x (n,) to int16. Returns the scale, NaN if x is not finite. */
static float round_to_int16(const float *x, int n, int16_t *rounded) {
    float largest = 0, sum = 0;
    _Pragma("omp simd reduction(max : largest) reduction(+ : sum)") for (int i = 0; i < n; i++) {
        float size = fabsf(x[i]);
        largest = size > largest ? size : largest;
        sum += size;
    }
    float inverse = largest > 1e-30f && isfinite(sum) ? 32767 / largest : 0;
    for (int i = 0; i < n; i++) {
        float scaled = inverse > 0 ? x[i] * inverse : 0;
        rounded[i] = (int16_t)(scaled + (scaled < 0 ? -0.5f : 0.5f));
    }
    return isfinite(sum) ? largest / 32767 : NAN;
}

/* The same for int8 and int16, which a CPU multiplies and adds in one instruction. A block's sum fits into 32 bits. */
static void matvec_int8(const int8_t *w, const float *scale, const int16_t *x, float x_scale, float *y, int rows,
                        int columns) {
    enum { BLOCK = 512 };
    for (int row = 0; row < rows; row++) {
        float total = 0;
        for (int begin = 0; begin < columns; begin += BLOCK) {
            int end = columns < begin + BLOCK ? columns : begin + BLOCK;
            int32_t sum = 0;
            for (int i = begin; i < end; i++) sum += (int16_t)w[i] * x[i];
            total += sum;
        }
        y[row] = total * scale[row] * x_scale;
        w += columns;
    }
}

/* This thread's rows of y (rows,) = w (rows, columns) x. `rounded` has room for `columns` numbers. */
static void matvec(int type, Matrix w, const float *x, float *y, int rows, int columns, int16_t *rounded, Worker me) {
    int begin = range_begin(rows, me), end = range_end(rows, me);
    size_t first = (size_t)begin * columns;
    if (type == INT8) {
        float scale = round_to_int16(x, columns, rounded);
        matvec_int8((const int8_t *)w.weights + first, w.scale + begin, rounded, scale, y + begin, end - begin, columns);
    } else if (type == BFLOAT16)
        matvec_bfloat16((const uint16_t *)w.weights + first, x, y + begin, end - begin, columns);
    else
        matvec_float32((const float *)w.weights + first, x, y + begin, end - begin, columns);
}

static void rms_norm(const float *x, const float *weight, float eps, int n, float *y) {
    float squares = 0;
    _Pragma("omp simd reduction(+ : squares)") for (int i = 0; i < n; i++) squares += x[i] * x[i];
    float scale = 1 / sqrtf(squares / n + eps);
    for (int i = 0; i < n; i++) y[i] = weight[i] * (x[i] * scale);
}

/* In place on a query or key (D,): RMSNorm (qk_norm only), then RoPE, which rotates the pair i, i + D/2
   (model.apply_rotary). */
static void norm_and_rope(float *x, const float *norm, float eps, const float *cos, const float *sin, int D) {
    if (norm) rms_norm(x, norm, eps, D, x);
    for (int i = 0, half = D / 2; i < half; i++) {
        float first = x[i], second = x[i + half];
        x[i] = first * cos[i] - second * sin[i];
        x[i + half] = second * cos[i + half] + first * sin[i + half];
    }
}

/* out (D,) = softmax(q · keys / sqrt(D)) · values over the slots 0 to last. */
static void attention(const float *q, const float *keys, const float *values, int last, int D, float *scores,
                   float *restrict out) {
    float scale = 1 / sqrtf((float)D), highest = -INFINITY, sum = 0;
    for (int s = 0; s <= last; s++) {
        const float *key = keys + (size_t)s * D;
        float dot = 0;
        _Pragma("omp simd reduction(+ : dot)") for (int i = 0; i < D; i++) dot += q[i] * key[i];
        scores[s] = dot * scale;
        if (scores[s] > highest) highest = scores[s];
    }
    memset(out, 0, D * sizeof *out);
    for (int s = 0; s <= last; s++) {
        const float *value = values + (size_t)s * D;
        float weight = expf(scores[s] - highest);
        sum += weight;
        for (int i = 0; i < D; i++) out[i] += weight * value[i];
    }
    for (int i = 0; i < D; i++) out[i] /= sum;
}

int has_openmp(void) {
#ifdef _OPENMP
    return 1;
#else
    return 0;
#endif
}

/* The number of columns of the widest matrix. */
static int64_t widest(const Model *m) {
    int64_t heads = m->n_heads * (int64_t)m->head_dim, columns = m->dim > m->hidden ? m->dim : m->hidden;
    return heads > columns ? heads : columns;
}

/* Returns the number of floats that `scratch` must hold. */
int64_t scratch_size(const Model *m, int slots, int threads) {
    return m->dim + (m->n_heads * 2 + m->n_kv_heads * 2) * (int64_t)m->head_dim + 2 * (int64_t)m->hidden +
           (m->dim + widest(m) / 2 + (int64_t)slots) * threads;
}

/* Stores `token` in the cache at `position` and writes the logits (V,) of the next token. keys and values: (layers, K,
   slots, D). */
void decode_token(const Model *m, const Layer *layers, int token, int position, float *keys, float *values, int slots,
                  float *logits, float *scratch, int threads) {
    const int C = m->dim, H = m->n_heads, K = m->n_kv_heads, D = m->head_dim, hidden = m->hidden;
    float *stream = scratch, *q = stream + C, *k = q + H * D, *v = k + K * D, *attended = v + K * D;
    float *gate = attended + H * D, *up = gate + hidden, *per_thread = up + hidden;
    const float *cos = m->cos + (size_t)position * D, *sin = m->sin + (size_t)position * D;
    memcpy(stream, m->embedding + (size_t)token * C, C * sizeof *stream);
#pragma omp parallel num_threads(threads)
    {
        Worker me = this_worker();
        float *x = per_thread + me.thread * (size_t)(C + widest(m) / 2 + slots), *scores = x + C + widest(m) / 2;
        int16_t *rounded = (int16_t *)(x + C);
        for (int l = 0; l < m->n_layers; l++) {
            const Layer *layer = layers + l;
            rms_norm(stream, layer->attention_norm, m->norm_eps, C, x);
            matvec(m->matrix_type, layer->q, x, q, H * D, C, rounded, me);
            matvec(m->matrix_type, layer->k, x, k, K * D, C, rounded, me);
            matvec(m->matrix_type, layer->v, x, v, K * D, C, rounded, me);
            barrier();
            for (int g = range_begin(K, me); g < range_end(K, me); g++) { /* a key/value head and its query heads */
                size_t first = ((size_t)l * K + g) * slots * D, here = first + (size_t)position * D;
                norm_and_rope(k + g * D, layer->k_norm, m->norm_eps, cos, sin, D);
                memcpy(keys + here, k + g * D, D * sizeof *keys);
                memcpy(values + here, v + g * D, D * sizeof *values);
                for (int h = g * (H / K); h < (g + 1) * (H / K); h++) {
                    norm_and_rope(q + h * D, layer->q_norm, m->norm_eps, cos, sin, D);
                    attention(q + h * D, keys + first, values + first, position, D, scores, attended + h * D);
                }
            }
            barrier();
            matvec(m->matrix_type, layer->o, attended, x, C, H * D, rounded, me);
            for (int i = range_begin(C, me); i < range_end(C, me); i++) stream[i] += x[i];
            barrier();
            rms_norm(stream, layer->mlp_norm, m->norm_eps, C, x);
            matvec(m->matrix_type, layer->gate, x, gate, hidden, C, rounded, me);
            matvec(m->matrix_type, layer->up, x, up, hidden, C, rounded, me);
            for (int i = range_begin(hidden, me); i < range_end(hidden, me); i++)
                gate[i] = gate[i] / (1 + expf(-gate[i])) * up[i];
            barrier();
            matvec(m->matrix_type, layer->down, gate, x, C, hidden, rounded, me);
            for (int i = range_begin(C, me); i < range_end(C, me); i++) stream[i] += x[i];
            barrier();
        }
        rms_norm(stream, m->norm, m->norm_eps, C, x);
        matvec(m->matrix_type, m->head, x, logits, m->vocab, C, rounded, me);
    }
}
