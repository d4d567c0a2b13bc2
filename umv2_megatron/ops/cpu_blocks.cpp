// What stands between the products of a transformer block, for CPUs: SwiGLU, RMS norm, rotary embedding, each in one pass
// over its numbers forward and one backward; cpu_blocks.py calls them and has the equations. Composed of PyTorch's
// functions each would make several tensors as large as its input, and the time is that of memory and page faults.
//
// Everything is computed in float and rounded once. A row belongs to one thread, and sums over rows are added up in
// blocks of a fixed size, so that results do not depend on the number of threads.

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "cpu_exponential.h"
#include "cpu_rows.h"
#include "cpu_threads.h"

namespace {

constexpr int64_t ELEMENTS_PER_THREAD = 1 << 14;
constexpr int64_t BLOCK = 64;  // rows whose gradients of the gains are added up before they meet others

using umv2::bfloat16;
using umv2::narrow;
using umv2::widen;

inline float sigmoid(float x) { return 1.0f / (1.0f + umv2::exponential(-x)); }

// x [rows, 2 width], the gate first; scale [rows] or null, which is ones; out [rows, width].
template <typename T>
void swiglu(int64_t rows, int64_t width, const T* x, const float* scale, T* out, int64_t threads) {
    umv2::in_parallel(threads, rows, ELEMENTS_PER_THREAD / width + 1, [&](int64_t part, int64_t parts) {
        for (int64_t row = rows * part / parts; row < rows * (part + 1) / parts; ++row) {
            const T *gate = x + row * 2 * width, *linear = gate + width;
            T* to = out + row * width;
            const float factor = scale ? scale[row] : 1.0f;
#pragma omp simd
            for (int64_t j = 0; j < width; ++j) {
                const float a = widen(gate[j]);
                narrow(a * sigmoid(a) * widen(linear[j]) * factor, to[j]);
            }
        }
    });
}

// scale_grad [rows], null where scale is.
template <typename T>
void swiglu_backward(int64_t rows, int64_t width, const T* grad, const T* x, const float* scale, T* x_grad,
                     float* scale_grad, int64_t threads) {
    umv2::in_parallel(threads, rows, ELEMENTS_PER_THREAD / width + 1, [&](int64_t part, int64_t parts) {
        for (int64_t row = rows * part / parts; row < rows * (part + 1) / parts; ++row) {
            const T *gate = x + row * 2 * width, *linear = gate + width, *upstream = grad + row * width;
            T *gate_grad = x_grad + row * 2 * width, *linear_grad = gate_grad + width;
            const float factor = scale ? scale[row] : 1.0f;
            float sum = 0;
#pragma omp simd reduction(+ : sum)
            for (int64_t j = 0; j < width; ++j) {
                const float a = widen(gate[j]), b = widen(linear[j]), s = sigmoid(a), g = widen(upstream[j]);
                sum += g * a * s * b;
                narrow(g * factor * b * s * (1.0f + a * (1.0f - s)), gate_grad[j]);
                narrow(g * factor * a * s, linear_grad[j]);
            }
            if (scale_grad) scale_grad[row] = sum;
        }
    });
}

// A tensor [sizes[0], sizes[1], sizes[2], width] with any strides but for the last dimension; row i of all.
struct Rows {
    int64_t sizes[3], strides[3];

    int64_t count() const { return sizes[0] * sizes[1] * sizes[2]; }
    int64_t at(int64_t row) const {
        const int64_t k = row % sizes[2], rest = row / sizes[2];
        return rest / sizes[1] * strides[0] + rest % sizes[1] * strides[1] + k * strides[2];
    }
};

inline float inverse_norm(float square, int64_t width, double epsilon) {
    return 1.0f / std::sqrt(square / static_cast<float>(width) + static_cast<float>(epsilon));
}

template <typename T>
inline float sum_of_squares(const T* x, int64_t width) {
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t j = 0; j < width; ++j) sum += widen(x[j]) * widen(x[j]);
    return sum;
}

// out is contiguous.
template <typename T>
void rms_norm(const Rows& rows, int64_t width, double epsilon, const T* x, const T* gain, T* out, int64_t threads) {
    umv2::in_parallel(threads, rows.count(), ELEMENTS_PER_THREAD / width + 1, [&](int64_t part, int64_t parts) {
        for (int64_t row = rows.count() * part / parts; row < rows.count() * (part + 1) / parts; ++row) {
            const T* from = x + rows.at(row);
            T* to = out + row * width;
            const float factor = inverse_norm(sum_of_squares(from, width), width, epsilon);
#pragma omp simd
            for (int64_t j = 0; j < width; ++j) narrow(widen(from[j]) * factor * widen(gain[j]), to[j]);
        }
    });
}

// grad and x_grad are contiguous; gain_grads [blocks, width], scratch, and gain_grad [width] hold zeros.
template <typename T>
void rms_norm_backward(const Rows& rows, int64_t width, double epsilon, const T* grad, const T* x, const T* gain,
                       T* x_grad, float* gain_grads, float* gain_grad, int64_t threads) {
    const int64_t blocks = (rows.count() + BLOCK - 1) / BLOCK;
    umv2::in_parallel(threads, blocks, ELEMENTS_PER_THREAD / (width * BLOCK) + 1, [&](int64_t part, int64_t parts) {
        const int64_t stop = std::min(rows.count(), blocks * (part + 1) / parts * BLOCK);
        for (int64_t row = blocks * part / parts * BLOCK; row < stop; ++row) {
            const T *from = x + rows.at(row), *upstream = grad + row * width;
            T* to = x_grad + row * width;
            float* sums = gain_grads + row / BLOCK * width;
            const float factor = inverse_norm(sum_of_squares(from, width), width, epsilon);
            float along = 0;
#pragma omp simd reduction(+ : along)
            for (int64_t j = 0; j < width; ++j) along += widen(upstream[j]) * widen(gain[j]) * widen(from[j]);
            along *= factor * factor / static_cast<float>(width);
#pragma omp simd
            for (int64_t j = 0; j < width; ++j) {
                const float g = widen(upstream[j]), value = widen(from[j]);
                sums[j] += g * value * factor;
                narrow(factor * (g * widen(gain[j]) - along * value), to[j]);
            }
        }
    });
    umv2::add_up(gain_grads, blocks, width, gain_grad);
}

// Turns the pairs (x[j], x[j + width / 2]) of row (i, j, k) by the angles cosines[i], sines[i] [sizes[0], width];
// `direction` -1 turns back, for the backward. out is contiguous.
template <typename T>
void rotate(const Rows& rows, int64_t width, const float* cosines, const float* sines, float direction, const T* x, T* out,
            int64_t threads) {
    const int64_t half = width / 2, per_position = rows.sizes[1] * rows.sizes[2];
    umv2::in_parallel(threads, rows.count(), ELEMENTS_PER_THREAD / width + 1, [&](int64_t part, int64_t parts) {
        for (int64_t row = rows.count() * part / parts; row < rows.count() * (part + 1) / parts; ++row) {
            const T *low = x + rows.at(row), *high = low + half;
            T *to_low = out + row * width, *to_high = to_low + half;
            const float *c = cosines + row / per_position * width, *s = sines + row / per_position * width;
            if (direction > 0) {
#pragma omp simd
                for (int64_t j = 0; j < half; ++j) {
                    const float a = widen(low[j]), b = widen(high[j]);
                    narrow(a * c[j] - b * s[j], to_low[j]);
                    narrow(b * c[half + j] + a * s[half + j], to_high[j]);
                }
            } else {
#pragma omp simd
                for (int64_t j = 0; j < half; ++j) {
                    const float a = widen(low[j]), b = widen(high[j]);
                    narrow(a * c[j] + b * s[half + j], to_low[j]);
                    narrow(b * c[half + j] - a * s[j], to_high[j]);
                }
            }
        }
    });
}

}  // namespace

// `half` says that numbers are bfloat16 and not float.
extern "C" {

#define EITHER(call)        \
    if (half) {             \
        using T = bfloat16; \
        call;               \
    } else {                \
        using T = float;    \
        call;               \
    }
#define IN(name) static_cast<const T*>(name)
#define OUT(name) static_cast<T*>(name)

int64_t umv2_norm_block() { return BLOCK; }

void umv2_swiglu(int half, int64_t threads, int64_t rows, int64_t width, const void* x, const float* scale, void* out) {
    EITHER(swiglu(rows, width, IN(x), scale, OUT(out), threads))
}

void umv2_swiglu_backward(int half, int64_t threads, int64_t rows, int64_t width, const void* grad, const void* x,
                          const float* scale, void* x_grad, float* scale_grad) {
    EITHER(swiglu_backward(rows, width, IN(grad), IN(x), scale, OUT(x_grad), scale_grad, threads))
}

void umv2_rms_norm(int half, int64_t threads, const Rows* rows, int64_t width, double epsilon, const void* x,
                   const void* gain, void* out) {
    EITHER(rms_norm(*rows, width, epsilon, IN(x), IN(gain), OUT(out), threads))
}

void umv2_rms_norm_backward(int half, int64_t threads, const Rows* rows, int64_t width, double epsilon, const void* grad,
                            const void* x, const void* gain, void* x_grad, float* gain_grads,
                            float* gain_grad) {
    EITHER(rms_norm_backward(*rows, width, epsilon, IN(grad), IN(x), IN(gain), OUT(x_grad), gain_grads, gain_grad,
                             threads))
}

void umv2_rotate(int half, int64_t threads, const Rows* rows, int64_t width, const float* cosines, const float* sines,
                 double direction, const void* x, void* out) {
    EITHER(rotate(*rows, width, cosines, sines, static_cast<float>(direction), IN(x), OUT(out), threads))
}

}  // extern "C"
