"""C++ that both halves of a block have for a step of decoding (``block_attention_umv2``, ``block_feedforward_umv2``):
scratch memory, norms, and linear layers, of which one alone can be called, too.

It is a text in a Python file because transformers copies only these with a model.
"""

BLOCK = r"""
// Structures as in native_umv2.py.

#pragma once

#include <vector>

#include "products.h"

namespace {

using namespace umv2;

struct Scratch {  // of the thread that calls; kept, and shared by its team
    float* take(int64_t count) {
        float* from = first_ + used_;
        used_ += (count + LINE - 1) / LINE * LINE;
        return from;
    }
    void room(int64_t count) {
        if (numbers_.size() < static_cast<size_t>(count + LINE)) numbers_.resize(static_cast<size_t>(count + LINE));
        // A vector that crosses the border of a cache line takes twice as long.
        const auto place = reinterpret_cast<uintptr_t>(numbers_.data()) / sizeof(float) % LINE;
        first_ = numbers_.data() + (LINE - place) % LINE;
        used_ = 0;
    }

  private:
    std::vector<float> numbers_;
    float* first_ = nullptr;
    int64_t used_ = 0;
};

Scratch& scratch() {
    thread_local Scratch own;
    return own;
}

int64_t packed_size(int64_t columns) { return columns * (LARGEST_BATCH + 2 * LANES); }

}  // namespace

extern "C" {

struct Norm {
    const float* gain;
    float shift, epsilon;  // shift: 1 where the gain is zero-centered
};

struct Linear {
    const float *weight, *bias;
    int64_t rows;
};

}  // extern "C"

namespace {

void norm_rows(const Team& team, const Norm& norm, const float* x, int64_t batch, int64_t size, float* to) {
    for (int64_t m = team.begin(batch); m < team.end(batch); ++m)
        rms_norm(x + m * size, norm.gain, norm.shift, norm.epsilon, size, to + m * size);
}

}  // namespace

extern "C" {

// out [M, rows] = x [M, columns] weight' + bias
void umv2_linear(const float* x, const Linear* layer, int64_t batch, int64_t columns, float* out, int64_t threads) {
    Scratch& own = scratch();
    own.room(packed_size(columns) + 64);
    float* packed = own.take(packed_size(columns));
    const Segment segment = {layer->weight, layer->bias, layer->rows, out, layer->rows, false};
    with_team(threads, [&](const Team& team) { multiply(team, batch, columns, x, packed, &segment, 1); });
}

}  // extern "C"
"""
