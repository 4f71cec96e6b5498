/* One token through the network on a CPU: common/generation.py calls this where it decodes a single row.

   Decoding reads every weight once for each token, so memory sets its speed. In Python each of a hundred small
   operations costs about as much as the weights that it reads; here they are one call. fastpath/decoder.py hands
   over the same weights and the same cache.

   Matrices are (rows, columns), row after row, in float32 or bfloat16; all else, and every sum, is in float32. Columns
   come in multiples of 64. */

#include <math.h>
#include <stddef.h>

#include "simd.h"

enum { FLOAT32, BFLOAT16 };

typedef struct {
    const float *attention_norm, *q_norm, *k_norm, *mlp_norm; /* q_norm and k_norm: (D,) or NULL */
    const void *q, *k, *v, *o, *gate, *up, *down;
} Layer;

typedef struct {
    int32_t dim, hidden, n_layers, n_heads, n_kv_heads, head_dim, vocab, matrix_type;
    float norm_eps;
    const float *embedding, *norm, *cos, *sin; /* (V, C), (C,), (S, D) and (S, D) */
    const void *head;                          /* (V, C) */
} Model;

/* Each thread computes its share of the rows of every product, and of the heads. */
typedef struct {
    int thread, threads;
} Share;

#ifdef _OPENMP
#include <omp.h>
static Share my_share(void) { return (Share){omp_get_thread_num(), omp_get_num_threads()}; }
static inline void wait_for_all(void) {
#pragma omp barrier
}
#else /* a compiler without OpenMP: one thread */
static Share my_share(void) { return (Share){0, 1}; }
static inline void wait_for_all(void) {}
#endif
static int share_begin(int n, Share me) { return (int)((int64_t)n * me.thread / me.threads); }
static int share_end(int n, Share me) { return (int)((int64_t)n * (me.thread + 1) / me.threads); }

/* y (rows,) = w (rows, columns) x. Row after row, so that memory is read in its order: four rows at once, in four streams,
   take twice as long. Four sums, which do not wait for one another. */
#define PRODUCT(NAME, TYPE, LOAD)                                                                                      \
    static void NAME(const TYPE *w, const float *x, float *y, int rows, int columns) {                                 \
        for (int row = 0; row < rows; row++) {                                                                         \
            floats a = {0}, b = {0}, c = {0}, d = {0};                                                                 \
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
PRODUCT(product_float32, float, load_float32)
PRODUCT(product_bfloat16, uint16_t, load_bfloat16)

/* This thread's share of y (rows,) = w (rows, columns) x. */
static void product(int type, const void *w, const float *x, float *y, int rows, int columns, Share me) {
    int begin = share_begin(rows, me), end = share_end(rows, me);
    size_t first = (size_t)begin * columns;
    if (type == BFLOAT16)
        product_bfloat16((const uint16_t *)w + first, x, y + begin, end - begin, columns);
    else
        product_float32((const float *)w + first, x, y + begin, end - begin, columns);
}

static void normalise(const float *x, const float *weight, float eps, int n, float *y) {
    float squares = 0;
    _Pragma("omp simd reduction(+ : squares)") for (int i = 0; i < n; i++) squares += x[i] * x[i];
    float scale = 1 / sqrtf(squares / n + eps);
    for (int i = 0; i < n; i++) y[i] = weight[i] * (x[i] * scale);
}

/* A query or key made ready in place: normalised (Qwen3 only), then dimension i turned with i + D/2 (model.apply_rotary). */
static void place(float *x, const float *norm, float eps, const float *cos, const float *sin, int D) {
    if (norm) normalise(x, norm, eps, D, x);
    for (int i = 0, half = D / 2; i < half; i++) {
        float first = x[i], second = x[i + half];
        x[i] = first * cos[i] - second * sin[i];
        x[i + half] = second * cos[i + half] + first * sin[i + half];
    }
}

/* out (D,) = softmax(q · keys / sqrt(D)) over the slots 0 to last, times the values. */
static void attend(const float *q, const float *keys, const float *values, int last, int D, float *scores,
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

/* How many floats `scratch` must hold. */
int64_t scratch_size(const Model *m, int slots, int threads) {
    return m->dim + (m->n_heads * 2 + m->n_kv_heads * 2) * (int64_t)m->head_dim + 2 * (int64_t)m->hidden +
           (m->dim + (int64_t)slots) * threads;
}

/* Puts `token` into the cache at `position`; logits (V,) after it. keys and values: (layers, K, slots, D). */
void decode_token(const Model *m, const Layer *layers, int token, int position, float *keys, float *values, int slots,
                  float *logits, float *scratch, int threads) {
    const int C = m->dim, H = m->n_heads, K = m->n_kv_heads, D = m->head_dim, hidden = m->hidden;
    float *stream = scratch, *q = stream + C, *k = q + H * D, *v = k + K * D, *attended = v + K * D;
    float *gate = attended + H * D, *up = gate + hidden, *of_threads = up + hidden;
    const float *cos = m->cos + (size_t)position * D, *sin = m->sin + (size_t)position * D;
    memcpy(stream, m->embedding + (size_t)token * C, C * sizeof *stream);
#pragma omp parallel num_threads(threads)
    {
        Share me = my_share();
        float *x = of_threads + me.thread * (size_t)(C + slots), *scores = x + C;
        for (int l = 0; l < m->n_layers; l++) {
            const Layer *layer = layers + l;
            normalise(stream, layer->attention_norm, m->norm_eps, C, x);
            product(m->matrix_type, layer->q, x, q, H * D, C, me);
            product(m->matrix_type, layer->k, x, k, K * D, C, me);
            product(m->matrix_type, layer->v, x, v, K * D, C, me);
            wait_for_all();
            for (int g = share_begin(K, me); g < share_end(K, me); g++) { /* a key/value head, and the queries it serves */
                size_t first = ((size_t)l * K + g) * slots * D, here = first + (size_t)position * D;
                place(k + g * D, layer->k_norm, m->norm_eps, cos, sin, D);
                memcpy(keys + here, k + g * D, D * sizeof *keys);
                memcpy(values + here, v + g * D, D * sizeof *values);
                for (int h = g * (H / K); h < (g + 1) * (H / K); h++) {
                    place(q + h * D, layer->q_norm, m->norm_eps, cos, sin, D);
                    attend(q + h * D, keys + first, values + first, position, D, scores, attended + h * D);
                }
            }
            wait_for_all();
            product(m->matrix_type, layer->o, attended, x, C, H * D, me);
            for (int i = share_begin(C, me); i < share_end(C, me); i++) stream[i] += x[i];
            wait_for_all();
            normalise(stream, layer->mlp_norm, m->norm_eps, C, x);
            product(m->matrix_type, layer->gate, x, gate, hidden, C, me);
            product(m->matrix_type, layer->up, x, up, hidden, C, me);
            for (int i = share_begin(hidden, me); i < share_end(hidden, me); i++)
                gate[i] = gate[i] / (1 + expf(-gate[i])) * up[i];
            wait_for_all();
            product(m->matrix_type, layer->down, gate, x, C, hidden, me);
            for (int i = share_begin(C, me); i < share_end(C, me); i++) stream[i] += x[i];
            wait_for_all();
        }
        normalise(stream, m->norm, m->norm_eps, C, x);
        product(m->matrix_type, m->head, x, logits, m->vocab, C, me);
    }
}
