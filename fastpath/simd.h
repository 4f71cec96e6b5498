/* Vectors of 16 numbers for decode.c and kernels.c. The compiler maps them to the registers that the CPU has. */

#include <stdint.h>
#include <string.h>

enum { LANES = 16 };
typedef float f32x16 __attribute__((vector_size(64)));
typedef int32_t i32x16 __attribute__((vector_size(64)));
typedef uint32_t u32x16 __attribute__((vector_size(64)));
typedef uint16_t u16x16 __attribute__((vector_size(32)));

static inline f32x16 load_float32(const float *p) {
    f32x16 x;
    memcpy(&x, p, sizeof x);
    return x;
}

static inline void store_float32(float *p, f32x16 x) { memcpy(p, &x, sizeof x); }

static inline f32x16 load_bfloat16(const uint16_t *p) { /* a bfloat16 is the upper half of a float32 */
    u16x16 x;
    memcpy(&x, p, sizeof x);
    return (f32x16)(__builtin_convertvector(x, u32x16) << 16);
}

/* The bits of x in bfloat16, in the lower half of each number: rounds to nearest, ties to even; NaN stays NaN. */
static inline u32x16 round_to_bfloat16(f32x16 x) {
    u32x16 bits = (u32x16)x, nan = (u32x16)(x != x), rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    return (rounded & ~nan) | (0x7fc0 & nan);
}

static inline void store_bfloat16(uint16_t *p, f32x16 x) {
    u16x16 y = __builtin_convertvector(round_to_bfloat16(x), u16x16);
    memcpy(p, &y, sizeof y);
}

static inline f32x16 blend(i32x16 mask, f32x16 yes, f32x16 no) {
    return (f32x16)((mask & (i32x16)yes) | (~mask & (i32x16)no));
}

/* exp(x) to 2 ulp, as 2^n · exp(r) with |r| ≤ ln(2)/2. x is clamped to -87 (exp gives 1e-38, which counts as 0) and 88;
   NaN stays NaN. The polynomial is that of Cephes (Moshier 1989, expf). */
static inline f32x16 exp_f32x16(f32x16 x) {
    const f32x16 lowest = (f32x16){0} - 87, highest = (f32x16){0} + 88, round = (f32x16){0} + 12582912; /* 1.5 · 2^23 */
    x = blend(x < lowest, lowest, blend(x > highest, highest, x));
    f32x16 n = (x * 1.44269504f + round) - round, r = x - n * 0.693359375f + n * 2.12194440e-4f;
    f32x16 p = 1.9875691500e-4f * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1;
    return (f32x16)((i32x16)p + (__builtin_convertvector(n, i32x16) << 23));
}
