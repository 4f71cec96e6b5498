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

static inline f32x16 load_bfloat16(const uint16_t *p) { /* a bfloat16 is the upper half of a float32 */
    u16x16 x;
    memcpy(&x, p, sizeof x);
    return (f32x16)(__builtin_convertvector(x, u32x16) << 16);
}
