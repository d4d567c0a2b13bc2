"""C++ of the selection of the best scores, for the kernels of an export and for those of training. It is a text in a
Python file because transformers copies only these with a model.
"""

SELECTION = r"""
// The best of many scores. To find them, the range of the scores is bisected until a number is found that hardly more
// than the best reach: a few passes, each a vector instruction for several scores. Only what reaches it is sorted.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

namespace umv2 {

constexpr int64_t SPARE = 8;         // scores more than wanted that end a bisection
constexpr int BISECTIONS = 16;
constexpr int64_t COUNTED = 160;     // candidates up to which counting beats sorting

// A score and where it was found, ordered as (score, then smaller place first); NaN is the largest score.
template <typename Real>
struct Candidate {
    Real score;
    int64_t place;
    bool operator<(const Candidate& other) const {  // "comes before", so that sorting gives a descending order
        const bool nan = score != score, other_nan = other.score != other.score;
        if (nan || other_nan) return nan && (!other_nan || place < other.place);
        return score > other.score || (score == other.score && place < other.place);
    }
};

// float: both in one integer, so that ordering compares a single word, in vector instructions where there are many.
template <>
struct Candidate<float> {
    int64_t packed;
    Candidate() = default;
    Candidate(float score, int64_t place) {
        int32_t bits;
        score += 0.0f;  // -0 becomes 0
        std::memcpy(&bits, &score, sizeof bits);
        if (score != score) bits = 0x7fc00000;
        bits ^= bits >> 31 & 0x7fffffff;  // orders as the floats do
        packed = static_cast<int64_t>(bits) * (int64_t(1) << 32) + (0x7fffffff - place);
    }
    bool operator<(const Candidate& other) const { return packed > other.packed; }
};

inline int64_t place_of(const Candidate<float>& candidate) { return 0x7fffffff - (candidate.packed & 0x7fffffff); }
inline int64_t place_of(const Candidate<double>& candidate) { return candidate.place; }

// The `kept` best of `count` scores, in descending order. The result stands until the next call.
template <typename Real>
class Selection {
  public:
    const std::vector<Candidate<Real>>& best(const Real* scores, int64_t count, int64_t kept) {
        const Real floor = below(scores, count, kept);
        places_.resize(static_cast<size_t>(count));
        int64_t length = 0;
        // Without a branch: whether a score is large enough cannot be foretold. NaN is.
        for (int64_t i = 0; i < count; ++i) {
            places_[static_cast<size_t>(length)] = static_cast<int32_t>(i);
            length += !(scores[i] < floor);
        }
        list_.clear();
        for (int64_t i = 0; i < length; ++i) {
            const int32_t place = places_[static_cast<size_t>(i)];
            list_.push_back(Candidate<Real>{scores[place], place});
        }
        sort_out(length, kept);
        return sorted_;
    }

  private:
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

    // The `kept` first of `length` candidates, in order, to sorted_.
    void sort_out(int64_t length, int64_t kept) {
        if (length > COUNTED) {
            const auto end = list_.begin() + static_cast<std::ptrdiff_t>(kept);
            if (length > kept) std::nth_element(list_.begin(), end - 1, list_.end());
            sorted_.assign(list_.begin(), end);
            std::sort(sorted_.begin(), sorted_.end());
            return;
        }
        // The place of each is the number of those before it: more comparisons than in a sort, but none is a branch.
        sorted_.resize(static_cast<size_t>(length));
        const Candidate<Real>* all = list_.data();
        for (int64_t i = 0; i < length; ++i) {
            int64_t before = 0;
            const Candidate<Real> one = all[i];
#pragma omp simd reduction(+ : before)
            for (int64_t j = 0; j < length; ++j) before += all[j] < one;
            sorted_[static_cast<size_t>(before)] = one;
        }
        sorted_.resize(static_cast<size_t>(kept));
    }

    std::vector<int32_t> places_;
    std::vector<Candidate<Real>> list_, sorted_;
};

}  // namespace umv2
"""
