"""C++ of attention for a step of decoding, in one call (``step_umv2``), with its norm and the sum with the residual.
What it computes is what the modules of the same names compute in float32.

It is a text in a Python file because transformers copies only these with a model.
"""

ATTENTION = r"""
// M sequences of one new token each. Structures as in native_umv2.py; strides in numbers.

#pragma once

#include <cmath>
#include <limits>

#include "block.h"

template <typename Real>
struct Attention {
    Norm<Real> norm, query_norm, key_norm;  // the latter two with gain null: none
    Linear<Real> query, key, value, output;
    int64_t hidden, heads, groups, size, interleaved;
    float scaling;
};

template <typename Real>
struct Sequence {  // what the step brings: strides of caches by sequence, group, token; cos and sin by sequence
    const Real *cos, *sin;
    int64_t rotated, angle_stride;
    Real *keys, *values;
    int64_t key_strides[3], value_strides[3];
    int64_t seen;  // tokens in the cache before this one
    const void* mask;  // null, or [M or 1, seen + 1 or more]
    int64_t mask_stride, mask_kind;  // kind 1: bool, 2: numbers, to be added
};

namespace {

// Turn pairs of the first `rotated` numbers of a head; the sine has the sign of its product.
template <typename Real>
void rotate(float* x, const Real* cosines, const Real* sines, int64_t rotated, bool interleaved, float* spare) {
    std::memcpy(spare, x, static_cast<size_t>(rotated) * sizeof(float));
    const int64_t half = rotated / 2;
    const auto cosine = [=](int64_t i) { return value_of(cosines[i]); };
    const auto sine = [=](int64_t i) { return value_of(sines[i]); };
    if (interleaved) {
        for (int64_t i = 0; i < rotated; ++i) x[i] = spare[i] * cosine(i) + spare[i ^ 1] * sine(i);
        return;
    }
    for (int64_t i = 0; i < half; ++i) {
        x[i] = spare[i] * cosine(i) + spare[i + half] * sine(i);
        x[i + half] = spare[i + half] * cosine(i + half) + spare[i] * sine(i + half);
    }
}

// weights [heads, length] = query [heads, size] with each key; what is read next, the values, is asked for meanwhile.
template <typename Real>
void score_tokens(const float* query, int64_t heads, int64_t size, const Real* keys, int64_t stride,
                  const Real* values, int64_t value_stride, int64_t length, float* weights) {
    constexpr int TOGETHER = 4;
    int64_t j = 0;
    for (; size % LANES == 0 && j + TOGETHER <= length; j += TOGETHER) {
        const Real* rows = keys + j * stride;
        for (int i = 0; i < TOGETHER; ++i)
            for (int64_t d = 0; d < size; d += LINE_OF<Real>)
                __builtin_prefetch(values + (j + i) * value_stride + d, 0, 2);
        for (int64_t head = 0; head < heads; ++head) {
            Vector sums[TOGETHER];
            for (auto& sum : sums) sum = Vector{};
            for (int64_t d = 0; d < size; d += LANES) {
                const Vector x = load(query + head * size + d);
                for (int i = 0; i < TOGETHER; ++i) sums[i] += x * load(rows + i * stride + d);
            }
            for (int i = 0; i < TOGETHER; ++i) weights[head * length + j + i] = sum_of(sums[i]);
        }
    }
    for (; j < length; ++j)
        for (int64_t head = 0; head < heads; ++head)
            weights[head * length + j] = dot(query + head * size, keys + j * stride, size);
}

// to [size] = sum over tokens of weight * value; the keys that are read next are asked for meanwhile
template <typename Real>
void sum_tokens(const float* weights, int64_t length, const Real* values, int64_t stride, int64_t size,
                const Real* next_rows, int64_t next_stride, float* to) {
    constexpr int TOGETHER = 4;  // vectors, each in two sums, so that additions do not wait for each other
    int64_t d = 0;
    for (; d + TOGETHER * LANES <= size; d += TOGETHER * LANES) {
        Vector even[TOGETHER], odd[TOGETHER];
        for (int i = 0; i < TOGETHER; ++i) even[i] = odd[i] = Vector{};
        int64_t j = 0;
        for (; j + 2 <= length; j += 2) {
            for (int64_t l = 0; l < TOGETHER * LANES; l += LINE_OF<Real>) {
                __builtin_prefetch(next_rows + j * next_stride + d + l, 0, 2);
                __builtin_prefetch(next_rows + (j + 1) * next_stride + d + l, 0, 2);
            }
            const Real *row = values + j * stride + d, *next = row + stride;
            const float one = weights[j], other = weights[j + 1];
            for (int i = 0; i < TOGETHER; ++i) {
                even[i] += one * load(row + i * LANES);
                odd[i] += other * load(next + i * LANES);
            }
        }
        for (; j < length; ++j)
            for (int i = 0; i < TOGETHER; ++i) even[i] += weights[j] * load(values + j * stride + d + i * LANES);
        for (int i = 0; i < TOGETHER; ++i) store(to + d + i * LANES, even[i] + odd[i]);
    }
    if (d == size) return;
    std::fill(to + d, to + size, 0.0f);
    for (int64_t j = 0; j < length; ++j) add_scaled(to + d, weights[j], values + j * stride + d, size - d);
}

// Attention of the heads of one group of one sequence; query holds their rows and gets the output.
template <typename Real>
void attend(const Attention<Real>& a, const Sequence<Real>& q, int64_t m, int64_t group, float* query, float* key,
            const float* value, float* weights, float* spare) {
    const int64_t heads = a.heads / a.groups, size = a.size, length = q.seen + 1;
    const Real *cosine = q.cos + m * q.angle_stride, *sine = q.sin + m * q.angle_stride;
    Real* keys = q.keys + m * q.key_strides[0] + group * q.key_strides[1];
    Real* values = q.values + m * q.value_strides[0] + group * q.value_strides[1];
    const bool last = group + 1 == a.groups;
    const Real* next = last ? keys + q.key_strides[0] - group * q.key_strides[1] : keys + q.key_strides[1];
    if (a.key_norm.gain) rms_norm(key, a.key_norm.gain, a.key_norm.shift, a.key_norm.epsilon, size, key);
    if (q.rotated) rotate(key, cosine, sine, q.rotated, a.interleaved, spare);
    for (int64_t d = 0; d < size; ++d) {
        put_value(key[d], keys + q.seen * q.key_strides[2] + d);
        put_value(value[d], values + q.seen * q.value_strides[2] + d);
    }
    for (int64_t head = 0; head < heads; ++head) {
        float* x = query + head * size;
        if (a.query_norm.gain) rms_norm(x, a.query_norm.gain, a.query_norm.shift, a.query_norm.epsilon, size, x);
        if (q.rotated) rotate(x, cosine, sine, q.rotated, a.interleaved, spare);
        for (int64_t d = 0; d < size; ++d) x[d] *= a.scaling;
    }
    score_tokens(query, heads, size, keys, q.key_strides[2], values, q.value_strides[2], length, weights);
    for (int64_t head = 0; head < heads; ++head) {
        float* w = weights + head * length;
        if (q.mask_kind == 1) {
            const auto* seen = static_cast<const uint8_t*>(q.mask) + m * q.mask_stride;
            for (int64_t j = 0; j < length; ++j)
                if (!seen[j]) w[j] = -std::numeric_limits<float>::max();
        } else if (q.mask_kind == 2) {
            const auto* added = static_cast<const Real*>(q.mask) + m * q.mask_stride;
            for (int64_t j = 0; j < length; ++j) w[j] += value_of(added[j]);
        }
        float largest = w[0];
        for (int64_t j = 1; j < length; ++j) largest = std::max(largest, w[j]);
        int64_t j = 0;
        Vector sums{};
        for (; j + LANES <= length; j += LANES) {
            const Vector e = exponential(load(w + j) - largest);
            store(w + j, e);
            sums += e;
        }
        float sum = sum_of(sums);
        for (; j < length; ++j) sum += w[j] = std::exp(w[j] - largest);
        for (j = 0; j < length; ++j) w[j] /= sum;
        sum_tokens(w, length, values, q.value_strides[2], size, next, q.key_strides[2], query + head * size);
    }
}

// hidden [M, H] gets what attention adds to it; the caches get the keys and values of the new tokens.
template <typename Real>
int attention_step(const Attention<Real>& a, const Sequence<Real>& q, Real* given, int64_t batch, int64_t threads) {
    using Kept = Working<Real>;
    const int64_t inner = a.heads * a.size, shared = a.groups * a.size, heads = a.heads / a.groups;
    const int64_t packed_numbers = packed_size(std::max(a.hidden, inner));
    const int64_t own_numbers = heads * (q.seen + 1) + a.size + 128;
    Scratch& own = scratch();
    own.room(packed_numbers + batch * (a.hidden + inner + 2 * shared) + (threads + 1) * own_numbers + 64 * 8 +
             Kept::numbers(batch * a.hidden));
    float *packed = own.take(packed_numbers), *x = own.take(batch * a.hidden), *query = own.take(batch * inner);
    float *key = own.take(batch * shared), *value = own.take(batch * shared), *each = own.take(threads * own_numbers);
    const Kept hidden(given, batch * a.hidden, own);
    with_team(threads, [&](const Team& team) {
        hidden.read(team);
        if (Kept::COPIED) team.wait();
        norm_rows(team, a.norm, hidden.get(), batch, a.hidden, x);
        team.wait();
        const Segment<Real> inputs[] = {{a.query.weight, a.query.bias, inner, query, inner, false},
                                        {a.key.weight, a.key.bias, shared, key, shared, false},
                                        {a.value.weight, a.value.bias, shared, value, shared, false}};
        multiply(team, batch, a.hidden, x, packed, inputs, 3);
        team.wait();
        float *weights = each + team.part * own_numbers, *spare = weights + heads * (q.seen + 1);
        const int64_t places = batch * a.groups;
        for (int64_t i = team.begin(places); i < team.end(places); ++i)
            attend(a, q, i / a.groups, i % a.groups, query + i * heads * a.size, key + i * a.size, value + i * a.size,
                   weights, spare);
        team.wait();
        const Segment<Real> output = {a.output.weight, a.output.bias, a.hidden, hidden.get(), a.hidden, true};
        multiply(team, batch, inner, query, packed, &output, 1);
        if (Kept::COPIED) team.wait();
        hidden.write(team);
    });
    return 0;
}

}  // namespace

extern "C" {

int umv2_attention(const Attention<float>* attention, const Sequence<float>* sequence, float* hidden, int64_t batch,
                   int64_t threads) {
    return attention_step(*attention, *sequence, hidden, batch, threads);
}
int umv2_attention_bfloat16(const Attention<Half>* attention, const Sequence<Half>* sequence, Half* hidden,
                            int64_t batch, int64_t threads) {
    return attention_step(*attention, *sequence, hidden, batch, threads);
}

}  // extern "C"
"""
