/* Computes the forward pass of one token in each of 1 to 16 rows on a CPU.

   Decoding reads every weight once per token, so memory bandwidth limits the speed of a single row. From Python, the overhead
   of a hundred small operations costs about as much time as reading the weights; here one call does all of them. Several rows
   share the reading: each weight is read once for all of them.
   fastpath/native_decoder.py passes the weights and the key/value cache.

   Matrices (rows, columns) are row-major, in float32, in bfloat16, or in int8 with a scale for each row. The number of columns
   is a multiple of 64. Activations (features, lanes) are in float32: with one row there is one lane; with several there are 16,
   a lane for each row and the rest 0. What a matrix in int8 multiplies is rounded to int16 (with several rows only on a CPU
   with AVX512_VNNI); with several rows, and on a CPU with AVX512_BF16, what a matrix in bfloat16 multiplies is rounded to
   bfloat16. */

#include <math.h>
#include <stddef.h>

#include "simd.h"
#if defined __AVX512BF16__ || defined __AVX512VNNI__
#include <immintrin.h>
#endif

enum { FLOAT32, BFLOAT16, INT8 };
enum { BLOCK = 512, WIDEST_HEAD = 256 };

typedef struct {
    const void *weights;
    const float *scale;      /* (rows,) in int8, else NULL */
    const int32_t *block_sums; /* in int8 the sums of each row's blocks: (rows, blocks of BLOCK columns), else NULL */
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

typedef struct {
    void *keys, *values; /* (layers, rows, K, slots, D) */
    int32_t rows, slots, type;
} Cache;

/* The next token of a row of the cache. */
typedef struct {
    int32_t token, row, position;
} Next;

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

/* A thread's part of n things, whose begin is a multiple of `unit`. */
enum { UNIT = 16 };
static int range_begin(int n, int unit, Worker me) {
    int units = (n + unit - 1) / unit, begin = (int)((int64_t)units * me.thread / me.threads) * unit;
    return begin < n ? begin : n;
}
static int range_end(int n, int unit, Worker me) { return range_begin(n, unit, (Worker){me.thread + 1, me.threads}); }

/* ---------------------------------------------------------------------------------------------
   A matrix times one vector */

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

/* int8 times int16, which a CPU multiplies and adds in one instruction. A block's sum fits into 32 bits. */
static void matvec_int8(const int8_t *w, const float *scale, const int16_t *x, float x_scale, float *y, int rows,
                        int columns) {
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

/* This thread's rows of y (rows,) = w (rows, columns) x. `rounded` has space for `columns` numbers. */
static void matvec(int type, Matrix w, const float *x, float *y, int rows, int columns, int16_t *rounded, Worker me) {
    int begin = range_begin(rows, UNIT, me), end = range_end(rows, UNIT, me);
    size_t first = (size_t)begin * columns;
    if (type == INT8) {
        float scale = round_to_int16(x, columns, rounded);
        matvec_int8((const int8_t *)w.weights + first, w.scale + begin, rounded, scale, y + begin, end - begin, columns);
    } else if (type == BFLOAT16)
        matvec_bfloat16((const uint16_t *)w.weights + first, x, y + begin, end - begin, columns);
    else
        matvec_float32((const float *)w.weights + first, x, y + begin, end - begin, columns);
}

/* ---------------------------------------------------------------------------------------------
   A matrix times 16 vectors

   A tile is 8 rows of the matrix and BLOCK of its columns. Each number of it, or each pair of numbers of a row, is broadcast
   and multiplies a register that holds one feature, or two, of all lanes: 8 sums (tile row) of 16 lanes, without a
   horizontal sum. With at most 8 rows to decode, half of each register is enough. */

enum { TILE = 8 };
typedef float f32x4 __attribute__((vector_size(16)));
typedef float f32x8 __attribute__((vector_size(32)));
typedef int32_t i32x8 __attribute__((vector_size(32)));
typedef uint32_t u32x8 __attribute__((vector_size(32)));

/* sums (TILE, LANES) += w (TILE, n) x (n / STEP, LANES), where STEP features of a lane are beside one another. */
#define MATMUL_TILE(NAME, VECTOR, TYPE, STEP, DOT)                                                                     \
    static void NAME(const TYPE *const *w, const void *x, int n, size_t ahead, void *sums) {                           \
        VECTOR sum[TILE];                                                                                              \
        for (int r = 0; r < TILE; r++) memcpy(&sum[r], (const char *)sums + r * 64, sizeof sum[r]);                    \
        for (int i = 0; i < n;) {                                                                                      \
            for (int r = 0; r < TILE; r++) __builtin_prefetch(w[r] + i + ahead, 0, 2);                                 \
            for (int end = i + 64 / (int)sizeof(TYPE); i < end; i += STEP) {                                           \
                VECTOR lanes;                                                                                          \
                memcpy(&lanes, (const char *)x + (size_t)i / STEP * 64, sizeof lanes);                                 \
                for (int r = 0; r < TILE; r++) sum[r] = DOT(sum[r], lanes, w[r] + i);                                  \
            }                                                                                                          \
        }                                                                                                              \
        for (int r = 0; r < TILE; r++) memcpy((char *)sums + r * 64, &sum[r], sizeof sum[r]);                          \
    }

#define MULTIPLY_ADD(SUM, X, W) ((SUM) + (X) * *(W))
MATMUL_TILE(tile_float32_16, f32x16, float, 1, MULTIPLY_ADD)
MATMUL_TILE(tile_float32_8, f32x8, float, 1, MULTIPLY_ADD)

static inline int32_t pair(const void *p) { /* two numbers of 16 bits */
    int32_t both;
    memcpy(&both, p, sizeof both);
    return both;
}
#ifdef __AVX512BF16__
#define DOT_BFLOAT16_16(SUM, X, W)                                                                                     \
    ((f32x16)_mm512_dpbf16_ps((__m512)(SUM), (__m512bh)(X), (__m512bh)_mm512_set1_epi32(pair(W))))
#define DOT_BFLOAT16_8(SUM, X, W)                                                                                      \
    ((f32x8)_mm256_dpbf16_ps((__m256)(SUM), (__m256bh)(X), (__m256bh)_mm256_set1_epi32(pair(W))))
MATMUL_TILE(tile_bfloat16_16, f32x16, uint16_t, 2, DOT_BFLOAT16_16)
MATMUL_TILE(tile_bfloat16_8, f32x8, uint16_t, 2, DOT_BFLOAT16_8)
#endif
#ifdef __AVX512VNNI__
/* The same for w in int8 and x in uint16, whose upper and lower bytes are multiplied apart: two planes (n / 4, LANES, 4), the
   lower bytes at `lower`. sums = 256 · upper + lower. */
#define MATMUL_TILE_INT8(NAME, VECTOR, UNSIGNED, BROADCAST, DOT)                                                       \
    static void NAME(const int8_t *const *w, const uint8_t *x, size_t lower, int n, size_t ahead, i32x16 *sums) {      \
        VECTOR upper_sum[TILE] = {0}, lower_sum[TILE] = {0};                                                           \
        for (int i = 0; i < n;) {                                                                                      \
            for (int r = 0; r < TILE; r++) __builtin_prefetch(w[r] + i + ahead, 0, 2);                                 \
            for (int end = i + 64; i < end; i += 4) {                                                                  \
                VECTOR up, low;                                                                                        \
                memcpy(&up, x + (size_t)i * LANES, sizeof up);                                                         \
                memcpy(&low, x + lower + (size_t)i * LANES, sizeof low);                                               \
                for (int r = 0; r < TILE; r++) {                                                                       \
                    int32_t four;                                                                                      \
                    memcpy(&four, w[r] + i, sizeof four);                                                              \
                    upper_sum[r] = DOT(upper_sum[r], up, BROADCAST(four));                                             \
                    lower_sum[r] = DOT(lower_sum[r], low, BROADCAST(four));                                            \
                }                                                                                                      \
            }                                                                                                          \
        }                                                                                                              \
        for (int r = 0; r < TILE; r++) {                                                                               \
            UNSIGNED sum = ((UNSIGNED)upper_sum[r] << 8) + (UNSIGNED)lower_sum[r]; /* may wrap */                      \
            memcpy(&sums[r], &sum, sizeof sum);                                                                        \
        }                                                                                                              \
    }
#define DOT_INT8_16(SUM, X, W) ((i32x16)_mm512_dpbusd_epi32((__m512i)(SUM), (__m512i)(X), W))
#define DOT_INT8_8(SUM, X, W) ((i32x8)_mm256_dpbusd_epi32((__m256i)(SUM), (__m256i)(X), W))
MATMUL_TILE_INT8(tile_int8_16, i32x16, u32x16, _mm512_set1_epi32, DOT_INT8_16)
MATMUL_TILE_INT8(tile_int8_8, i32x8, u32x8, _mm256_set1_epi32, DOT_INT8_8)
#endif

/* What x (columns, LANES) is multiplied as: float32 (columns, LANES); pairs of bfloat16 (columns / 2, LANES, 2); or, for
   matrices in int8, the planes of tile_int8 of x / scale + 32768. `scale` is each lane's, NaN if the lane is not finite. */
typedef struct {
    void *x;
    f32x16 scale;
} Packed;

static void pack(int type, const float *x, int columns, Packed *packed) {
#ifdef __AVX512VNNI__
    if (type == INT8) {
        f32x16 largest = {0}, sum = {0};
        for (int i = 0; i < columns; i++) {
            f32x16 size = (f32x16)((u32x16)load_float32(x + i * LANES) & 0x7fffffff);
            largest = blend(size > largest, size, largest);
            sum += size;
        }
        i32x16 finite = sum <= 3.4028235e38f;
        f32x16 inverse = blend(finite & (largest > 1e-30f), 32767 / largest, (f32x16){0});
        packed->scale = blend(finite, largest / 32767, (f32x16){0} + NAN);
        for (int i = 0; i < columns; i += 4) {
            u32x16 upper = {0}, lower = {0};
            for (int j = 0; j < 4; j++) {
                f32x16 scaled = blend(inverse > 0, load_float32(x + (i + j) * LANES) * inverse, (f32x16){0});
                f32x16 away = blend(scaled < 0, (f32x16){0} - 0.5f, (f32x16){0} + 0.5f); /* as round_to_int16 */
                u32x16 number = (u32x16)__builtin_convertvector(scaled + away, i32x16) + 32768;
                upper |= (number >> 8) << (8 * j), lower |= (number & 255) << (8 * j);
            }
            memcpy((char *)packed->x + i * LANES, &upper, sizeof upper);
            memcpy((char *)packed->x + (columns + i) * LANES, &lower, sizeof lower);
        }
        return;
    }
#endif
#ifdef __AVX512BF16__
    if (type == BFLOAT16) {
        for (int i = 0; i < columns; i += 2) {
            u32x16 first = round_to_bfloat16(load_float32(x + i * LANES));
            u32x16 both = first | round_to_bfloat16(load_float32(x + (i + 1) * LANES)) << 16;
            memcpy((char *)packed->x + i / 2 * sizeof both, &both, sizeof both);
        }
        return;
    }
#endif
    packed->scale = (f32x16){0} + 1;
    memcpy(packed->x, x, (size_t)columns * LANES * sizeof *x);
}

/* sums (TILE, LANES) += w (TILE, n) x (n, LANES), of the block of n columns that begins at `begin`. `w` are the addresses of
   the rows there, and `ahead` how many numbers further the rows are that come later, to prefetch. */
static void multiply_block(int type, const char *const *w, const int32_t *const *block_sums, const Packed *packed,
                           int columns, int begin, int n, size_t ahead, int wide, f32x16 *sums) {
    const char *x = (const char *)packed->x;
#ifdef __AVX512VNNI__
    if (type == INT8) {
        i32x16 block[TILE] = {0};
        (wide ? tile_int8_16 : tile_int8_8)((const int8_t *const *)w, (const uint8_t *)x + begin * LANES,
                                            (size_t)columns * LANES, n, ahead, block);
        for (int r = 0; r < TILE; r++) {
            u32x16 sum = (u32x16)block[r] - 32768 * (uint32_t)block_sums[r][begin / BLOCK];
            sums[r] += __builtin_convertvector((i32x16)sum, f32x16);
        }
        return;
    }
#endif
#ifdef __AVX512BF16__
    if (type == BFLOAT16) {
        (wide ? tile_bfloat16_16 : tile_bfloat16_8)((const uint16_t *const *)w, x + begin / 2 * 64, n, ahead, sums);
        return;
    }
#endif
    float tile[TILE][BLOCK];
    const float *rows[TILE];
    for (int r = 0; r < TILE; r++) {
        rows[r] = type == FLOAT32 ? (const float *)w[r] : tile[r];
        for (int i = 0; i < n && type == BFLOAT16; i += LANES)
            store_float32(tile[r] + i, load_bfloat16((const uint16_t *)w[r] + i));
        for (int i = 0; i < n && type == INT8; i++) tile[r][i] = ((const int8_t *)w[r])[i];
    }
    (wide ? tile_float32_16 : tile_float32_8)(rows, x + begin * 64, n, type == FLOAT32 ? ahead : 0, sums);
}

/* This thread's rows of y (rows, LANES) = w (rows, columns) x. `wide`: more than 8 lanes. */
static void matmul(int type, Matrix w, const Packed *packed, float *y, int rows, int columns, int wide, Worker me) {
    static const size_t sizes[] = {sizeof(float), sizeof(uint16_t), sizeof(int8_t)};
    const int end = range_end(rows, UNIT, me), blocks = (columns + BLOCK - 1) / BLOCK;
    for (int row = range_begin(rows, UNIT, me); row < end; row += TILE) {
        int count = end - row < TILE ? end - row : TILE;
        f32x16 sums[TILE] = {0};
        for (int begin = 0; begin < columns; begin += BLOCK) {
            int n = columns - begin < BLOCK ? columns - begin : BLOCK;
            const char *from[TILE]; /* where less than 8 rows are left, the last one is repeated */
            const int32_t *block_sums[TILE];
            for (int r = 0; r < TILE; r++) {
                size_t each = row + (r < count ? r : count - 1);
                from[r] = (const char *)w.weights + (each * columns + begin) * sizes[type];
                block_sums[r] = w.block_sums + each * blocks;
            }
            multiply_block(type, from, block_sums, packed, columns, begin, n, (size_t)2 * TILE * columns, wide, sums);
        }
        for (int r = 0; r < count; r++) {
            f32x16 sum = type == INT8 ? sums[r] * w.scale[row + r] : sums[r];
            store_float32(y + (size_t)(row + r) * LANES, type == INT8 ? sum * packed->scale : sum);
        }
    }
}

/* ---------------------------------------------------------------------------------------------
   Between the matrices */

static void rms_norm(const float *x, const float *weight, float eps, int n, float *y) {
    float squares = 0;
    _Pragma("omp simd reduction(+ : squares)") for (int i = 0; i < n; i++) squares += x[i] * x[i];
    float scale = 1 / sqrtf(squares / n + eps);
    for (int i = 0; i < n; i++) y[i] = weight[i] * (x[i] * scale);
}

/* The same for x and y (n, LANES). */
static void rms_norm_lanes(const float *x, const float *weight, float eps, int n, float *y) {
    f32x16 squares = {0}, scale;
    for (int i = 0; i < n; i++) squares += load_float32(x + i * LANES) * load_float32(x + i * LANES);
    for (int lane = 0; lane < LANES; lane++) scale[lane] = 1 / sqrtf(squares[lane] / n + eps);
    for (int i = 0; i < n; i++) store_float32(y + i * LANES, weight[i] * (load_float32(x + i * LANES) * scale));
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

static inline float sum_of(f32x16 x) {
    f32x8 halves[2];
    f32x4 quarters[2];
    memcpy(halves, &x, sizeof halves);
    halves[0] += halves[1];
    memcpy(quarters, halves, sizeof quarters);
    quarters[0] += quarters[1];
    return (quarters[0][0] + quarters[0][1]) + (quarters[0][2] + quarters[0][3]);
}

/* out (D,) = softmax(q · keys / sqrt(D)) · values over `count` slots. `scores` has space for count + LANES numbers. */
#define ATTENTION(NAME, TYPE, LOAD)                                                                                    \
    static inline __attribute__((always_inline)) void NAME(const float *q, const TYPE *keys, const TYPE *values,       \
                                                           int count, const int D, float *scores, float *out) {        \
        float scale = 1 / sqrtf((float)D), highest = -INFINITY, total = 0;                                             \
        f32x16 sums[WIDEST_HEAD / LANES] = {0};                                                                        \
        for (int s = 0; s < count; s++) {                                                                              \
            f32x16 dot = {0};                                                                                          \
            for (int i = 0; i < D; i += LANES) dot += load_float32(q + i) * LOAD(keys + (size_t)s * D + i);            \
            scores[s] = sum_of(dot) * scale;                                                                           \
            highest = scores[s] > highest ? scores[s] : highest;                                                       \
        }                                                                                                              \
        for (int s = count; s < count + LANES; s++) scores[s] = highest;                                               \
        for (int s = 0; s < count; s += LANES)                                                                         \
            store_float32(scores + s, exp_f32x16(load_float32(scores + s) - highest));                                 \
        for (int s = 0; s < count; s++) {                                                                              \
            total += scores[s];                                                                                        \
            for (int i = 0; i < D; i += LANES) sums[i / LANES] += scores[s] * LOAD(values + (size_t)s * D + i);        \
        }                                                                                                              \
        for (int i = 0; i < D; i += LANES) store_float32(out + i, sums[i / LANES] / total);                            \
    }
ATTENTION(attention_float32, float, load_float32)
ATTENTION(attention_bfloat16, uint16_t, load_bfloat16)

/* Stores a key and a value (D,) in `slot`, and attends with each of n queries (n, D) to the slots up to it. `first` is the
   index of slot 0 in the cache. */
static inline __attribute__((always_inline)) void store_and_attend(const Cache *cache, size_t first, int slot,
                                                                   const float *key, const float *value, const float *q,
                                                                   int n, const int D, float *scores, float *out) {
    size_t here = first + (size_t)slot * D;
    if (cache->type == BFLOAT16) {
        uint16_t *keys = cache->keys, *values = cache->values;
        for (int i = 0; i < D; i += LANES) {
            store_bfloat16(keys + here + i, load_float32(key + i));
            store_bfloat16(values + here + i, load_float32(value + i));
        }
        for (int h = 0; h < n; h++)
            attention_bfloat16(q + h * D, keys + first, values + first, slot + 1, D, scores, out + h * D);
    } else {
        float *keys = cache->keys, *values = cache->values;
        memcpy(keys + here, key, D * sizeof *keys);
        memcpy(values + here, value, D * sizeof *values);
        for (int h = 0; h < n; h++)
            attention_float32(q + h * D, keys + first, values + first, slot + 1, D, scores, out + h * D);
    }
}

int has_openmp(void) {
#ifdef _OPENMP
    return 1;
#else
    return 0;
#endif
}

/* ---------------------------------------------------------------------------------------------
   The network */

typedef struct {
    int lanes; /* 1 or 16 */
    float *stream, *q, *k, *v, *attended, *gate, *up, *added, *logits;
    size_t shared, own; /* how many floats the arrays above take, and each thread's own */
} Scratch;

/* The arrays within `memory`, which may be NULL to learn their sizes. */
static Scratch lay_out(const Model *m, int slots, int n, float *memory) {
    int heads = m->n_heads * m->head_dim, kv_heads = m->n_kv_heads * m->head_dim, lanes = n == 1 ? 1 : LANES;
    int widest = m->dim > m->hidden ? m->dim : m->hidden;
    widest = heads > widest ? heads : widest;
    Scratch s = {.lanes = lanes};
    float **arrays[] = {&s.stream, &s.q, &s.k, &s.v, &s.attended, &s.gate, &s.up, &s.added, &s.logits};
    int features[] = {m->dim, heads, kv_heads, kv_heads, heads, m->hidden, m->hidden, m->dim, lanes > 1 ? m->vocab : 0};
    for (int i = 0; i < 9; i++) {
        *arrays[i] = memory ? memory + s.shared : NULL;
        s.shared += (size_t)features[i] * lanes;
    }
    /* normed, packed; the queries, key and value of a key/value head; its output; scores */
    s.own = ((size_t)m->dim + widest) * lanes + (2 * m->n_heads / m->n_kv_heads + 2) * m->head_dim + slots + LANES;
    return s;
}

/* Returns the number of floats that `memory` must hold to decode n rows. */
int64_t scratch_size(const Model *m, int slots, int n, int threads) {
    Scratch s = lay_out(m, slots, n, NULL);
    return (int64_t)(s.shared + s.own * threads);
}

/* Stores the next token of each of n rows (1 to 16, all different) in the cache, and writes the logits (n, V) that follow. */
void decode(const Model *m, const Layer *layers, const Cache *cache, const Next *next, int n, float *logits, float *memory,
            int threads) {
    const int C = m->dim, H = m->n_heads, K = m->n_kv_heads, D = m->head_dim, hidden = m->hidden, group = H / K;
    const Scratch s = lay_out(m, cache->slots, n, memory);
    const int lanes = s.lanes, wide = n > 8;
    memset(s.stream, 0, (size_t)C * lanes * sizeof *s.stream);
    memset(s.attended, 0, (size_t)H * D * lanes * sizeof *s.attended);
    for (int r = 0; r < n; r++)
        for (int i = 0; i < C; i++) s.stream[i * lanes + r] = m->embedding[(size_t)next[r].token * C + i];
#pragma omp parallel num_threads(threads)
    {
        Worker me = this_worker();
        float *normed = memory + s.shared + me.thread * s.own, *rounded = normed + (size_t)C * lanes;
        float *query = memory + s.shared + (me.thread + 1) * s.own - (cache->slots + LANES) - (2 * group + 2) * D;
        float *key = query + group * D, *value = key + D, *out = value + D, *scores = out + group * D;
        Packed packed = {.x = rounded};

#define NORM(WEIGHT) (lanes == 1 ? rms_norm : rms_norm_lanes)(s.stream, WEIGHT, m->norm_eps, C, normed)
#define PACK(X, COLUMNS)                                                                                               \
    if (lanes > 1) pack(m->matrix_type, X, COLUMNS, &packed)
#define MATMUL(W, X, Y, ROWS, COLUMNS)                                                                                 \
    if (lanes == 1)                                                                                                    \
        matvec(m->matrix_type, W, X, Y, ROWS, COLUMNS, (int16_t *)rounded, me);                                        \
    else                                                                                                               \
        matmul(m->matrix_type, W, &packed, Y, ROWS, COLUMNS, wide, me)
#define ADD_TO_STREAM()                                                                                                \
    for (int i = range_begin(C, UNIT, me) * lanes; i < range_end(C, UNIT, me) * lanes; i++) s.stream[i] += s.added[i]

        for (int l = 0; l < m->n_layers; l++) {
            const Layer *layer = layers + l;
            NORM(layer->attention_norm);
            PACK(normed, C);
            MATMUL(layer->q, normed, s.q, H * D, C);
            MATMUL(layer->k, normed, s.k, K * D, C);
            MATMUL(layer->v, normed, s.v, K * D, C);
            barrier();
            for (int each = range_begin(n * K, 1, me); each < range_end(n * K, 1, me); each++) {
                int r = each / K, g = each % K; /* a row, and a key/value head with its query heads */
                const float *cos = m->cos + (size_t)next[r].position * D, *sin = m->sin + (size_t)next[r].position * D;
                size_t first = (((size_t)l * cache->rows + next[r].row) * K + g) * cache->slots * D;
                for (int i = 0; i < D; i++) {
                    key[i] = s.k[(g * D + i) * lanes + r];
                    value[i] = s.v[(g * D + i) * lanes + r];
                }
                for (int i = 0; i < group * D; i++) query[i] = s.q[(g * group * D + i) * lanes + r];
                norm_and_rope(key, layer->k_norm, m->norm_eps, cos, sin, D);
                for (int h = 0; h < group; h++) norm_and_rope(query + h * D, layer->q_norm, m->norm_eps, cos, sin, D);
                if (D == 64) /* known to the compiler, so that sums stay in registers */
                    store_and_attend(cache, first, next[r].position, key, value, query, group, 64, scores, out);
                else
                    store_and_attend(cache, first, next[r].position, key, value, query, group, D, scores, out);
                for (int i = 0; i < group * D; i++) s.attended[(g * group * D + i) * lanes + r] = out[i];
            }
            barrier();
            PACK(s.attended, H * D);
            MATMUL(layer->o, s.attended, s.added, C, H * D);
            ADD_TO_STREAM();
            barrier();
            NORM(layer->mlp_norm);
            PACK(normed, C);
            MATMUL(layer->gate, normed, s.gate, hidden, C);
            MATMUL(layer->up, normed, s.up, hidden, C);
            for (int i = range_begin(hidden, UNIT, me) * lanes; i < range_end(hidden, UNIT, me) * lanes; i += LANES) {
                f32x16 gate = load_float32(s.gate + i);
                store_float32(s.gate + i, gate / (1 + exp_f32x16(-gate)) * load_float32(s.up + i));
            }
            barrier();
            PACK(s.gate, hidden);
            MATMUL(layer->down, s.gate, s.added, C, hidden);
            ADD_TO_STREAM();
            barrier();
        }
        NORM(m->norm);
        PACK(normed, C);
        MATMUL(m->head, normed, lanes == 1 ? logits : s.logits, m->vocab, C);
        for (int r = 0; r < n && lanes > 1; r++)
            for (int v = range_begin(m->vocab, UNIT, me); v < range_end(m->vocab, UNIT, me); v++)
                logits[(size_t)r * m->vocab + v] = s.logits[(size_t)v * lanes + r];
    }
}
