"""C++ of the selection of the best scores, which stands here once: for the kernels of an export (``native_umv2``) and
for those of training (``ops/cpu_build`` reads this file). It is a text in a Python file because transformers copies
only these with a model.
"""

SELECTION = r"""
// The best of some scores. To find them, the range of the scores is bisected until a number is found that hardly more
// than the best reach: a few passes, each a vector instruction for several scores. Only what reaches it is put in
// order.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>
#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#endif

namespace umv2 {

constexpr int64_t SPARE = 8;     // scores more than wanted that end a bisection
constexpr int BISECTIONS = 16;
constexpr int64_t COUNTED = 160;  // candidates up to which counting beats sorting
constexpr int64_t WORD = 32;      // scores that are compared for one word of bits

// Bit i of the result: whether scores[i] reaches `floor`. Of WORD scores; NaN reaches any number.
template <typename Real>
inline uint32_t reaching(const Real* scores, Real floor) {
    uint32_t bits = 0;
    for (int64_t i = 0; i < WORD; ++i) bits |= static_cast<uint32_t>(!(scores[i] < floor)) << i;
    return bits;
}

#if defined(__AVX512F__)
template <>
inline uint32_t reaching(const float* scores, float floor) {
    const __m512 least = _mm512_set1_ps(floor);
    const uint32_t low = _mm512_cmp_ps_mask(_mm512_loadu_ps(scores), least, _CMP_NLT_UQ);
    return low | static_cast<uint32_t>(_mm512_cmp_ps_mask(_mm512_loadu_ps(scores + 16), least, _CMP_NLT_UQ)) << 16;
}
#elif defined(__AVX2__)
template <>
inline uint32_t reaching(const float* scores, float floor) {
    const __m256 least = _mm256_set1_ps(floor);
    uint32_t bits = 0;
    for (int i = 0; i < 4; ++i) {
        const __m256 reach = _mm256_cmp_ps(_mm256_loadu_ps(scores + 8 * i), least, _CMP_NLT_UQ);
        bits |= static_cast<uint32_t>(_mm256_movemask_ps(reach)) << (8 * i);
    }
    return bits;
}
#endif

// Integers that are ordered as numbers are; -0 is 0, and NaN is the largest.
inline int32_t ordered(float score) {
    int32_t bits;
    score += 0.0f;
    std::memcpy(&bits, &score, sizeof bits);
    if (score != score) bits = 0x7fc00000;
    return bits ^ (bits >> 31 & 0x7fffffff);
}
inline int64_t ordered(double score) {
    int64_t bits;
    score += 0.0;
    std::memcpy(&bits, &score, sizeof bits);
    if (score != score) bits = 0x7ff8000000000000;
    return bits ^ (bits >> 63 & 0x7fffffffffffffff);
}

// The `kept` best of `count` scores, in descending order; of equals the first wins.
template <typename Real>
class Selection {
  public:
    // Places of the best; the result stands until the next call.
    const int32_t* best(const Real* scores, int64_t count, int64_t kept) {
        collect(scores, count, below(scores, count, kept));
        sort_out(kept);
        return sorted_.data();
    }

  private:
    using Key = decltype(ordered(Real()));
#if defined(__AVX512F__)
    static constexpr int64_t BYTES = 64;
#else
    static constexpr int64_t BYTES = 32;
#endif
    static constexpr int64_t LANES = BYTES / sizeof(Key);
    typedef Key Vector __attribute__((vector_size(BYTES)));

    // A number that at least `kept` of the scores reach, and few more where bisection of their range finds such a one.
    static Real below(const Real* scores, int64_t count, int64_t kept) {
        Real low = std::numeric_limits<Real>::infinity(), high = -low;
        const Real lowest = high;
        int32_t odd = 0;
#pragma omp simd reduction(min : low) reduction(max : high) reduction(+ : odd)
        for (int64_t i = 0; i < count; ++i) {
            low = scores[i] < low ? scores[i] : low;
            high = scores[i] > high ? scores[i] : high;
            odd += scores[i] != scores[i];
        }
        if (odd || !(high - low < std::numeric_limits<Real>::infinity())) return lowest;
        const int64_t enough = kept + std::max(kept / 4, SPARE);
        for (int step = 0; step < BISECTIONS; ++step) {
            const Real middle = low + (high - low) / 2;
            int32_t reach = 0;
#pragma omp simd reduction(+ : reach)
            for (int64_t i = 0; i < count; ++i) reach += scores[i] >= middle;
            if (reach < kept) {
                high = middle;
            } else {
                low = middle;
                if (reach <= enough) break;
            }
        }
        return low;
    }

    // What reaches `floor`: places_ in ascending order, and keys_.
    void collect(const Real* scores, int64_t count, Real floor) {
        places_.resize(static_cast<size_t>(count));
        keys_.resize(static_cast<size_t>((count + LANES - 1) / LANES * LANES));
        length_ = 0;
        int64_t first = 0;
        for (; first + WORD <= count; first += WORD)
            for (uint32_t bits = reaching(scores + first, floor); bits; bits &= bits - 1)
                add(scores, first + __builtin_ctz(bits));
        for (; first < count; ++first)
            if (!(scores[first] < floor)) add(scores, first);
    }

    void add(const Real* scores, int64_t place) {
        places_[static_cast<size_t>(length_)] = static_cast<int32_t>(place);
        keys_[static_cast<size_t>(length_++)] = ordered(scores[place]);
    }

    // The `kept` first of the candidates, in order, to sorted_.
    void sort_out(int64_t kept) {
        sorted_.resize(static_cast<size_t>(std::max(length_, kept)));
        if (length_ > COUNTED) {
            order_.resize(static_cast<size_t>(length_));
            for (int64_t i = 0; i < length_; ++i) order_[static_cast<size_t>(i)] = static_cast<int32_t>(i);
            const auto before = [this](int32_t i, int32_t j) {
                const Key one = keys_[static_cast<size_t>(i)], other = keys_[static_cast<size_t>(j)];
                return one > other || (one == other && i < j);
            };
            const auto end = order_.begin() + static_cast<std::ptrdiff_t>(kept);
            if (length_ > kept) std::nth_element(order_.begin(), end - 1, order_.end(), before);
            std::sort(order_.begin(), end, before);
            for (int64_t i = 0; i < kept; ++i)
                sorted_[static_cast<size_t>(i)] = places_[static_cast<size_t>(order_[static_cast<size_t>(i)])];
            return;
        }
        // The place of each is the number of those before it: more comparisons than in a sort, but none is a branch.
        // Candidates are in the order of their places, so equals are before those that come later.
        const Key* keys = keys_.data();
        for (int64_t first = 0; first < length_; first += LANES) {
            const int64_t end = std::min(first + LANES, length_);
            Vector mine, before = {}, lane;
            std::memcpy(&mine, keys + first, sizeof mine);
            for (int64_t i = 0; i < LANES; ++i) lane[i] = static_cast<Key>(first + i);
            for (int64_t j = 0; j < first; ++j) before -= (Vector{} + keys[j]) >= mine;
            for (int64_t j = first; j < end; ++j) {
                const Vector other = Vector{} + keys[j];
                before -= (other > mine) | ((other == mine) & (lane > static_cast<Key>(j)));
            }
            for (int64_t j = end; j < length_; ++j) before -= (Vector{} + keys[j]) > mine;
            for (int64_t j = first; j < end; ++j)
                sorted_[static_cast<size_t>(before[j - first])] = places_[static_cast<size_t>(j)];
        }
    }

    int64_t length_ = 0;
    std::vector<int32_t> places_, sorted_, order_;
    std::vector<Key> keys_;
};

}  // namespace umv2
"""
