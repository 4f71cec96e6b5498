/* 16 numbers at a time, in whatever registers the CPU has; for decode.c and kernels.c. */

#include <stdint.h>
#include <string.h>

enum { LANES = 16 };
typedef float floats __attribute__((vector_size(64)));
typedef int32_t ints __attribute__((vector_size(64)));
typedef uint32_t words __attribute__((vector_size(64)));
typedef uint16_t halves __attribute__((vector_size(32)));

static inline floats load_float32(const float *p) {
    floats x;
    memcpy(&x, p, sizeof x);
    return x;
}

static inline floats load_bfloat16(const uint16_t *p) { /* a bfloat16 is the upper half of a float32 */
    halves x;
    memcpy(&x, p, sizeof x);
    return (floats)(__builtin_convertvector(x, words) << 16);
}
