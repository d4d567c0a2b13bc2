"""C++ that both halves of a block have for a step of decoding (``block_attention_umv2``, ``block_feedforward_umv2``):
scratch memory, norms, and linear layers, of which one alone can be called, too.

It is a text in a Python file because transformers copies only these with a model.
"""

BLOCK = r"""
// Structures as in native_umv2.py.

#pragma once

#include <vector>

#include "tiles.h"

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

}  // namespace

template <typename Real>
struct Norm {
    const Real* gain;
    float shift, epsilon;  // shift: 1 where the gain is zero-centered
};

template <typename Real>
struct Linear {
    const Real *weight, *bias;
    int64_t rows;
};

namespace {

template <typename Real>
void norm_rows(const Team& team, const Norm<Real>& norm, const float* x, int64_t batch, int64_t size, float* to) {
    for (int64_t m = team.begin(batch); m < team.end(batch); ++m)
        rms_norm(x + m * size, norm.gain, norm.shift, norm.epsilon, size, to + m * size);
}

// What is computed with in float32: float32 numbers as they lie, others in a copy, written back in the end.
template <typename Real>
struct Working {
    static constexpr bool COPIED = !std::is_same_v<Real, float>;
    static int64_t numbers(int64_t count) { return COPIED ? count + LINE : 0; }

    Working(Real* given, int64_t count, Scratch& scratch) : given_(given), count_(count) {
        if constexpr (COPIED) numbers_ = scratch.take(count);
        else numbers_ = given;
    }
    float* get() const { return numbers_; }
    void read(const Team& team) const {
        if constexpr (COPIED) widen(given_ + begin(team), end(team) - begin(team), numbers_ + begin(team));
    }
    void write(const Team& team) const {
        if constexpr (COPIED) narrow(numbers_ + begin(team), end(team) - begin(team), given_ + begin(team));
    }

  private:
    int64_t begin(const Team& team) const { return team.begin(count_); }
    int64_t end(const Team& team) const { return team.end(count_); }
    Real* given_;
    float* numbers_;
    int64_t count_;
};

template <typename Real>
void multiply_one(Real* given, const Linear<Real>& layer, int64_t batch, int64_t columns, Real* result,
                  int64_t threads) {
    using Kept = Working<Real>;
    Scratch& own = scratch();
    own.room(packed_size(columns) + Kept::numbers(batch * columns) + Kept::numbers(batch * layer.rows) + 64);
    float* packed = own.take(packed_size(columns));
    const Kept x(given, batch * columns, own), out(result, batch * layer.rows, own);
    const Segment<Real> segment = {layer.weight, layer.bias, layer.rows, out.get(), layer.rows, false};
    with_team(threads, [&](const Team& team) {
        x.read(team);
        if (Kept::COPIED) team.wait();
        multiply(team, batch, columns, x.get(), packed, &segment, 1);
        if (Kept::COPIED) team.wait();
        out.write(team);
    });
}

}  // namespace

extern "C" {

// out [M, rows] = x [M, columns] weight' + bias
void umv2_linear(float* x, const Linear<float>* layer, int64_t batch, int64_t columns, float* out, int64_t threads) {
    multiply_one(x, *layer, batch, columns, out, threads);
}
void umv2_linear_bfloat16(Half* x, const Linear<Half>* layer, int64_t batch, int64_t columns, Half* out,
                          int64_t threads) {
    multiply_one(x, *layer, batch, columns, out, threads);
}

}  // extern "C"
"""
