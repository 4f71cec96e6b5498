/* Top-p sampling without a sort of all scores. fastpath/sampling.py calls it.

   Scores are counted into buckets by their distance from the highest one. Whole buckets are kept until their probabilities
   reach top_p; only the scores in the bucket where that happens are sorted. */

#include <math.h>
#include <stdlib.h>

#include "simd.h"

enum { BUCKETS = 1024 };
static const float RANGE = 40; /* nats below the highest score: what is further away has a probability below 1e-17 */

typedef struct {
    float score;
    int32_t index;
} Candidate;

static int by_score(const void *a, const void *b) { /* the highest first; of equal ones the first */
    const Candidate *x = a, *y = b;
    return x->score != y->score ? (x->score < y->score) - (x->score > y->score) : x->index - y->index;
}

static inline int bucket_of(float distance, float per_nat) { /* the last one also holds what is out of range */
    float place = distance * per_nat;
    return place < BUCKETS - 1 ? (int)place : BUCKETS - 1;
}

/* kept (V,) = the fewest highest scores (V,) whose probabilities sum to at least top_p, -inf elsewhere. A row with NaN or
   infinity is copied. `candidates` has space for V. */
static void keep_row(const float *scores, float *kept, int V, float top_p, Candidate *candidates) {
    float highest = -INFINITY, lowest = INFINITY, nan = 0;
    for (int i = 0; i < V; i++) {
        highest = scores[i] > highest ? scores[i] : highest;
        lowest = scores[i] < lowest && scores[i] > -INFINITY ? scores[i] : lowest;
        nan += scores[i] != scores[i];
    }
    if (nan || !isfinite(highest)) {
        memcpy(kept, scores, V * sizeof *kept);
        return;
    }
    int i = 0; /* kept holds the probabilities until the end, each times a constant */
    for (; i + LANES <= V; i += LANES) store_float32(kept + i, exp_f32x16(load_float32(scores + i) - highest));
    for (; i < V; i++) kept[i] = expf(scores[i] - highest);
    double mass[BUCKETS] = {0}, total = 0, before = 0;
    float spread = highest - lowest < RANGE ? highest - lowest : RANGE, per_nat = spread > 0 ? (BUCKETS - 1) / spread : 0;
    for (i = 0; i < V; i++) mass[bucket_of(highest - scores[i], per_nat)] += kept[i];
    for (int b = 0; b < BUCKETS; b++) total += mass[b];
    int border = 0, n = 0;
    while (border < BUCKETS - 1 && before + mass[border] < top_p * total) before += mass[border++];
    for (i = 0; i < V; i++)
        if (bucket_of(highest - scores[i], per_nat) == border) candidates[n++] = (Candidate){scores[i], i};
    qsort(candidates, n, sizeof *candidates, by_score);
    int taken = 0;
    for (; taken < n && before < top_p * total; taken++) before += kept[candidates[taken].index];
    for (i = 0; i < V; i++) kept[i] = bucket_of(highest - scores[i], per_nat) < border ? scores[i] : -INFINITY;
    for (i = 0; i < taken; i++) kept[candidates[i].index] = candidates[i].score;
}

/* The same for each row of scores (rows, V). candidates: (rows, V). */
void keep_top_p(const float *scores, float *kept, int64_t rows, int V, float top_p, void *candidates, int threads) {
#pragma omp parallel for num_threads(threads) if (rows > 1)
    for (int64_t row = 0; row < rows; row++)
        keep_row(scores + row * V, kept + row * V, V, top_p, (Candidate *)candidates + row * V);
}
