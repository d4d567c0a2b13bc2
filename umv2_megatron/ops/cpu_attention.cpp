// Causal attention for CPUs, forward and backward, without the scores of all pairs of tokens; cpu_attention.py calls it.
//
//     S = scale q k^T for keys up to the query's own,   P = softmax(S),   out = P v
//     dv = P^T dout,   dS = P (dout v^T - rowsum(dout out)) scale,   dq = dS k,   dk = dS^T q
//
// ROWS queries at a time get the scores of all their keys, which stay in cache: s numbers for each, so that the softmax
// needs no second look. Keys and values of a head are copied once, into panels for the products that run along Dh and
// into rows for those that run along the sequence. What is kept for the backward is log(sum of exponentials) of each row;
// the backward computes P again from it.
//
// A sample's group of query heads that share keys belongs to one thread, so there are no atomics, and results do not
// depend on the number of threads. Letters: s sequence, b samples, g groups (heads of keys), n query heads, D width of a
// head; q [s, b, n, D], k and v [s, b, g, D], any strides but the last.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "cpu_exponential.h"
#include "cpu_product.h"
#include "cpu_threads.h"

namespace {

using umv2::Left;
using umv2::PANEL;

constexpr int64_t ROWS = 48;  // a multiple of PANEL: the panels of a block's keys end where the block ends
static_assert(ROWS % PANEL == 0, "");

struct Tensor {  // as in cpu_attention.py
    float* data;
    int64_t strides[3];  // position, sample, head

    float* at(int64_t position, int64_t sample, int64_t head) const {
        return data + position * strides[0] + sample * strides[1] + head * strides[2];
    }
};

struct Sizes {  // as in cpu_attention.py
    int64_t length, samples, heads, groups, width, threads;
    double scale;

    int64_t padded() const { return (length + ROWS - 1) / ROWS * ROWS; }
    // Floats of a row of D numbers, in whole vectors.
    int64_t row() const { return (width + umv2::LANES - 1) / umv2::LANES * umv2::LANES; }
    float* lse(float* all, int64_t sample, int64_t head) const { return all + (sample * heads + head) * length; }
};

using Buffer = std::vector<float>;

Buffer zeros(int64_t count) { return Buffer(static_cast<size_t>(count)); }

// One head of a tensor, in rows [padded, row], zeros beyond it.
void to_rows(const Sizes& z, const Tensor& from, int64_t sample, int64_t head, Buffer& rows) {
    for (int64_t t = 0; t < z.length; ++t) std::copy_n(from.at(t, sample, head), z.width, rows.data() + t * z.row());
}

// The same in panels [padded / PANEL, D, PANEL], transposed.
void to_panels(const Sizes& z, const Tensor& from, int64_t sample, int64_t head, Buffer& panels) {
    for (int64_t t = 0; t < z.length; ++t) {
        const float* row = from.at(t, sample, head);
        float* to = panels.data() + t / PANEL * z.width * PANEL + t % PANEL;
        for (int64_t d = 0; d < z.width; ++d) to[d * PANEL] = row[d];
    }
}

Left rows_of(const Tensor& tensor, int64_t first, int64_t sample, int64_t head) {
    return {tensor.at(first, sample, head), tensor.strides[0], 1};
}

// Scores of `rows` queries from `first` on, [rows, width], with the keys up to the block's end; to exp(scale S - shift[i]),
// zero behind a row's own position.
inline void exponentials(const Sizes& z, int64_t first, int64_t rows, int64_t width, const float* shift, float* scores) {
    const float scale = static_cast<float>(z.scale);
    for (int64_t i = 0; i < rows; ++i) {
        float* row = scores + i * width;
        const int64_t count = first + i + 1;
        const float less = shift[i];
#pragma omp simd
        for (int64_t j = 0; j < count; ++j) row[j] = umv2::exponential(row[j] * scale - less);
        std::fill(row + count, row + width, 0.0f);
    }
}

void forward(const Sizes& z, const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& out, float* lse) {
    umv2::in_parallel(z.threads, z.samples * z.groups, 1, [&](int64_t part, int64_t parts) {
        Buffer keys = zeros(z.padded() * z.width), values = zeros(z.padded() * z.row()), scores = zeros(ROWS * z.padded());
        Buffer sums = zeros(ROWS * z.row());
        float shift[ROWS], total[ROWS];
        const float scale = static_cast<float>(z.scale);
        const int64_t share = z.heads / z.groups;
        for (int64_t task = z.samples * z.groups * part / parts; task < z.samples * z.groups * (part + 1) / parts; ++task) {
            const int64_t sample = task / z.groups, group = task % z.groups;
            to_panels(z, key, sample, group, keys);
            to_rows(z, value, sample, group, values);
            for (int64_t head = group * share; head < (group + 1) * share; ++head)
                for (int64_t first = 0; first < z.length; first += ROWS) {
                    const int64_t rows = std::min(ROWS, z.length - first), width = first + ROWS;
                    umv2::panel_product(rows_of(query, first, sample, head), rows, keys.data(), width / PANEL, z.width,
                                        scores.data(), width);
                    for (int64_t i = 0; i < rows; ++i) {
                        const float* row = scores.data() + i * width;
                        float largest = -std::numeric_limits<float>::infinity();
#pragma omp simd reduction(max : largest)
                        for (int64_t j = 0; j < first + i + 1; ++j) largest = row[j] > largest ? row[j] : largest;
                        shift[i] = largest * scale;
                    }
                    exponentials(z, first, rows, width, shift, scores.data());
                    for (int64_t i = 0; i < rows; ++i) {
                        const float* row = scores.data() + i * width;
                        float sum = 0;
#pragma omp simd reduction(+ : sum)
                        for (int64_t j = 0; j < width; ++j) sum += row[j];
                        total[i] = sum;
                        z.lse(lse, sample, head)[first + i] = shift[i] + std::log(sum);
                    }
                    umv2::product<false>({scores.data(), width, 1}, rows, values.data(), z.row(), width, sums.data(), z.row(),
                                         z.row());
                    for (int64_t i = 0; i < rows; ++i) {
                        const float *from = sums.data() + i * z.row(), factor = 1.0f / total[i];
                        float* to = out.at(first + i, sample, head);
                        for (int64_t d = 0; d < z.width; ++d) to[d] = from[d] * factor;
                    }
                }
        }
    });
}

void backward(const Sizes& z, const Tensor& grad, const Tensor& query, const Tensor& key, const Tensor& value,
              const Tensor& out, float* lse, const Tensor& query_grad, const Tensor& key_grad, const Tensor& value_grad) {
    umv2::in_parallel(z.threads, z.samples * z.groups, 1, [&](int64_t part, int64_t parts) {
        const int64_t in_rows = z.padded() * z.row();
        Buffer key_panels = zeros(z.padded() * z.width), value_panels = key_panels, keys = zeros(in_rows);
        Buffer key_sums, value_sums, scores = zeros(ROWS * z.padded()), grads = scores;
        Buffer queries = zeros(ROWS * z.row()), upstream = queries, sums = queries;
        float along[ROWS];
        const float scale = static_cast<float>(z.scale);
        const int64_t share = z.heads / z.groups;
        for (int64_t task = z.samples * z.groups * part / parts; task < z.samples * z.groups * (part + 1) / parts; ++task) {
            const int64_t sample = task / z.groups, group = task % z.groups;
            to_panels(z, key, sample, group, key_panels);
            to_panels(z, value, sample, group, value_panels);
            to_rows(z, key, sample, group, keys);
            key_sums.assign(static_cast<size_t>(in_rows), 0.0f);
            value_sums.assign(static_cast<size_t>(in_rows), 0.0f);
            for (int64_t head = group * share; head < (group + 1) * share; ++head)
                for (int64_t first = 0; first < z.length; first += ROWS) {
                    const int64_t rows = std::min(ROWS, z.length - first), width = first + ROWS;
                    for (int64_t i = 0; i < rows; ++i) {
                        const float *own = out.at(first + i, sample, head), *from = grad.at(first + i, sample, head);
                        float sum = 0;
#pragma omp simd reduction(+ : sum)
                        for (int64_t d = 0; d < z.width; ++d) sum += own[d] * from[d];
                        along[i] = sum;
                        std::copy_n(from, z.width, upstream.data() + i * z.row());
                        std::copy_n(query.at(first + i, sample, head), z.width, queries.data() + i * z.row());
                    }
                    umv2::panel_product({queries.data(), z.row(), 1}, rows, key_panels.data(), width / PANEL, z.width,
                                        scores.data(), width);
                    umv2::panel_product({upstream.data(), z.row(), 1}, rows, value_panels.data(), width / PANEL, z.width,
                                        grads.data(), width);
                    exponentials(z, first, rows, width, z.lse(lse, sample, head) + first, scores.data());
                    for (int64_t i = 0; i < rows; ++i) {
                        const float *p = scores.data() + i * width, less = along[i];
                        float* to = grads.data() + i * width;
#pragma omp simd
                        for (int64_t j = 0; j < width; ++j) to[j] = p[j] * (to[j] - less) * scale;
                    }
                    umv2::product<true>({scores.data(), 1, width}, width, upstream.data(), z.row(), rows, value_sums.data(),
                                        z.row(), z.row());
                    umv2::product<true>({grads.data(), 1, width}, width, queries.data(), z.row(), rows, key_sums.data(),
                                        z.row(), z.row());
                    umv2::product<false>({grads.data(), width, 1}, rows, keys.data(), z.row(), width, sums.data(), z.row(),
                                         z.row());
                    for (int64_t i = 0; i < rows; ++i)
                        std::copy_n(sums.data() + i * z.row(), z.width, query_grad.at(first + i, sample, head));
                }
            for (int64_t t = 0; t < z.length; ++t) {
                std::copy_n(key_sums.data() + t * z.row(), z.width, key_grad.at(t, sample, group));
                std::copy_n(value_sums.data() + t * z.row(), z.width, value_grad.at(t, sample, group));
            }
        }
    });
}

}  // namespace

extern "C" {

// lse [b, n, s].
void umv2_attention(const Sizes* sizes, const Tensor* query, const Tensor* key, const Tensor* value, const Tensor* out,
                    float* lse) {
    forward(*sizes, *query, *key, *value, *out, lse);
}

void umv2_attention_backward(const Sizes* sizes, const Tensor* grad, const Tensor* query, const Tensor* key,
                             const Tensor* value, const Tensor* out, float* lse, const Tensor* query_grad,
                             const Tensor* key_grad, const Tensor* value_grad) {
    backward(*sizes, *grad, *query, *key, *value, *out, lse, *query_grad, *key_grad, *value_grad);
}

}  // extern "C"
