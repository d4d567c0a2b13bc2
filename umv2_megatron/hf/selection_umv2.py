"""C++ of the selection of the best scores, which stands here once: for the kernels of an export (``native_umv2``) and
for those of training (``ops/cpu_build`` reads this file). It is a text in a Python file because transformers copies
only these with a model.
"""

SELECTION = r"""
// The best of some scores. One pass finds the largest of each of some groups, twice as many as scores are wanted. As
// many of these as are wanted reach a number, found by bisection of their range, and so at least as many scores do,
// hardly more where groups are alike. Only what reaches it is looked at again: its range is bisected until hardly more
// than the best are left, and these are put in order.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#include <vector>
#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#endif

namespace umv2 {

constexpr int64_t SPARE = 8;     // scores more than wanted that end a bisection
constexpr int BISECTIONS = 32;
constexpr int64_t COUNTED = 160;  // candidates up to which counting beats sorting
constexpr int64_t MOST_GROUPS = 256;  // beyond, all scores are candidates
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
        const int64_t vectors = (2 * kept + LANES - 1) / LANES;
        const bool many = vectors * LANES <= std::min(MOST_GROUPS, count / 2);
        Real low = -INFINITE, high = INFINITE;
        if (many) range_of_groups(scores, count, kept, vectors, low, high);
        collect(scores, count, low);
        narrow(kept, ordered(low), ordered(high));
        sort_out(kept);
        return sorted_.data();
    }

  private:
    using Key = decltype(ordered(Real()));
#if defined(__AVX512F__)
    static constexpr int64_t BYTES = 64;
#elif defined(__AVX2__)
    static constexpr int64_t BYTES = 32;
#else
    static constexpr int64_t BYTES = 16;
#endif
    static constexpr int64_t LANES = BYTES / sizeof(Key);
    typedef Key Vector __attribute__((vector_size(BYTES)));
    static constexpr Real INFINITE = std::numeric_limits<Real>::infinity();
    typedef Real Scores __attribute__((vector_size(BYTES)));

    // How many of `vectors` * LANES numbers reach `floor`; none is NaN.
    template <typename Number>
    static int64_t reach(const Number* numbers, int64_t vectors, Number floor) {
        int64_t total = 0;
#if defined(__AVX512F__)
        if constexpr (std::is_same<Number, float>::value) {
            const __m512 least = _mm512_set1_ps(floor);
            for (int64_t v = 0; v < vectors; ++v)
                total += __builtin_popcount(
                    _mm512_cmp_ps_mask(_mm512_loadu_ps(numbers + v * LANES), least, _CMP_GE_OQ));
            return total;
        } else if constexpr (std::is_same<Number, int32_t>::value) {
            for (int64_t v = 0; v < vectors; ++v)
                total += __builtin_popcount(_mm512_cmpge_epi32_mask(_mm512_loadu_si512(numbers + v * LANES),
                                                                    _mm512_set1_epi32(floor)));
            return total;
        }
#elif defined(__AVX2__)
        if constexpr (std::is_same<Number, float>::value) {
            const __m256 least = _mm256_set1_ps(floor);
            for (int64_t v = 0; v < vectors; ++v)
                total += __builtin_popcount(static_cast<uint32_t>(
                    _mm256_movemask_ps(_mm256_cmp_ps(_mm256_loadu_ps(numbers + v * LANES), least, _CMP_GE_OQ))));
            return total;
        }
#endif
        Vector sum = {};
        typedef Number Numbers __attribute__((vector_size(BYTES)));
        for (int64_t v = 0; v < vectors; ++v) {
            Numbers part;
            std::memcpy(&part, numbers + v * LANES, sizeof part);
            sum -= part >= floor;
        }
        for (int64_t i = 0; i < LANES; ++i) total += sum[i];
        return total;
    }

    // A number that at least `kept` scores reach, `floor`, and one that hardly any does, from the largest of
    // `vectors` * LANES groups, which hold all but the last few scores. NaN counts only where a group begins with it;
    // it reaches any number when candidates are collected.
    static void range_of_groups(const Real* scores, int64_t count, int64_t kept, int64_t vectors, Real& floor,
                                Real& top) {
        Real largest[MOST_GROUPS];
        const int64_t whole = count / LANES, groups = vectors * LANES;
        for (int64_t v = 0; v < vectors; ++v) {
            Scores best, part;
            std::memcpy(&best, scores + v * LANES, sizeof best);
            for (int64_t i = v + vectors; i < whole; i += vectors) {
                std::memcpy(&part, scores + i * LANES, sizeof part);
                best = best < part ? part : best;
            }
            std::memcpy(largest + v * LANES, &best, sizeof best);
        }
        Real low = INFINITE, high = -INFINITE;
        int32_t odd = 0;
#pragma omp simd reduction(min : low) reduction(max : high) reduction(+ : odd)
        for (int64_t i = 0; i < groups; ++i) {
            low = largest[i] < low ? largest[i] : low;
            high = largest[i] > high ? largest[i] : high;
            odd += largest[i] != largest[i];
        }
        if (odd || !(high - low < INFINITE)) return;
        top = high;
        const int64_t enough = kept + kept / 8;
        for (int step = 0; step < BISECTIONS; ++step) {
            const Real middle = low + (high - low) / 2;
            const int64_t reached = reach(largest, vectors, middle);
            (reached < kept ? high : low) = middle;
            if (reached >= kept && reached <= enough) break;
        }
        floor = low;
    }

    // What reaches `floor`: places_ in ascending order, and keys_.
    void collect(const Real* scores, int64_t count, Real floor) {
        const size_t room = static_cast<size_t>(count + LANES);  // whole vectors are written
        if (places_.size() < room) {
            places_.resize(room);
            keys_.resize(room);
            found_.resize(room);
        }
        int64_t first = 0, length = 0;
        int32_t* places = places_.data();
        Real* found = found_.data();
        const auto add = [&](int64_t place) {
            places[length] = static_cast<int32_t>(place);
            found[length++] = scores[place];
        };
#if defined(__AVX512F__)
        if constexpr (std::is_same<Real, float>::value) {
            const __m512 least = _mm512_set1_ps(floor);
            __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
            for (; first + LANES <= count; first += LANES, lanes = _mm512_add_epi32(lanes, _mm512_set1_epi32(LANES))) {
                const __m512 part = _mm512_loadu_ps(scores + first);
                const __mmask16 reach = _mm512_cmp_ps_mask(part, least, _CMP_NLT_UQ);
                _mm512_storeu_ps(found + length, _mm512_maskz_compress_ps(reach, part));
                _mm512_storeu_si512(places + length, _mm512_maskz_compress_epi32(reach, lanes));
                length += __builtin_popcount(reach);
            }
        }
#endif
        for (; first + WORD <= count; first += WORD)
            for (uint32_t bits = reaching(scores + first, floor); bits; bits &= bits - 1)
                add(first + __builtin_ctz(bits));
        for (; first < count; ++first)
            if (!(scores[first] < floor)) add(first);
        length_ = length;
        Key* keys = keys_.data();
        for (int64_t i = 0; i < length; i += LANES)
#pragma omp simd
            for (int64_t j = i; j < i + LANES; ++j) keys[j] = ordered(found[j]);
    }

    // Drops candidates that are not among the `kept` best until hardly more are left.
    // `low` is such that at least `kept` reach it.
    void narrow(int64_t kept, Key low, Key high) {
        const int64_t enough = kept + std::max(kept / 4, SPARE), length = length_;
        if (length <= enough) return;
        Key* keys = keys_.data();
        int32_t* places = places_.data();
        const int64_t vectors = (length + LANES - 1) / LANES;
        for (int64_t i = length; i < vectors * LANES; ++i) keys[i] = std::numeric_limits<Key>::min();
        for (int step = 0; step < BISECTIONS; ++step) {
            const Key middle = (low & high) + ((low ^ high) >> 1);  // of both, without an overflow
            const int64_t reached = reach(keys, vectors, middle);
            (reached < kept ? high : low) = middle;
            if (reached >= kept && reached <= enough) break;
        }
        int64_t left = 0, i = 0;
#if defined(__AVX512F__)
        if constexpr (std::is_same<Real, float>::value)
            for (; i < length; i += LANES) {
                const __m512i key = _mm512_loadu_si512(keys + i), place = _mm512_loadu_si512(places + i);
                const __mmask16 good = _mm512_cmpge_epi32_mask(key, _mm512_set1_epi32(low));
                _mm512_storeu_si512(keys + left, _mm512_maskz_compress_epi32(good, key));
                _mm512_storeu_si512(places + left, _mm512_maskz_compress_epi32(good, place));
                left += __builtin_popcount(good);
            }
#endif
        for (; i < length; ++i) {  // without a branch: nobody can foretell it
            const Key key = keys[i];
            keys[left] = key;
            places[left] = places[i];
            left += key >= low;
        }
        length_ = left;
    }

    // The `kept` first of the candidates, in order, to sorted_.
    void sort_out(int64_t kept) {
        if (sorted_.size() < static_cast<size_t>(length_)) sorted_.resize(static_cast<size_t>(length_));
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
        const int32_t* places = places_.data();
        int32_t* sorted = sorted_.data();
        const int64_t length = length_;
        for (int64_t first = 0; first < length; first += LANES) {
            const int64_t end = std::min(first + LANES, length);
            Vector mine, before = {}, lane;
            std::memcpy(&mine, keys + first, sizeof mine);
            for (int64_t i = 0; i < LANES; ++i) lane[i] = static_cast<Key>(i);
            lane += static_cast<Key>(first);
            for (int64_t j = 0; j < first; ++j) before -= (Vector{} + keys[j]) >= mine;
            for (int64_t j = first; j < end; ++j) {
                const Vector other = Vector{} + keys[j];
                before -= (other > mine) | ((other == mine) & (lane > static_cast<Key>(j)));
            }
            for (int64_t j = end; j < length; ++j) before -= (Vector{} + keys[j]) > mine;
            Key rank[LANES];
            std::memcpy(rank, &before, sizeof rank);
            for (int64_t j = first; j < end; ++j) sorted[rank[j - first]] = places[j];
        }
    }

    int64_t length_ = 0;
    std::vector<int32_t> places_, sorted_, order_;
    std::vector<Key> keys_;
    std::vector<Real> found_;
};

}  // namespace umv2
"""
