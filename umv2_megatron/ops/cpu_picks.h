// The picks of a lookup for CPUs: to whom they belong, how threads share them out, and how their rows are asked for.
//
// Letters as in interface.py; n picks in all, pick i belongs to tokens[i], or to i / per_token where tokens is null.

#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>
#include <vector>

#include "cpu_rows.h"
#include "cpu_threads.h"

namespace umv2 {

constexpr int64_t LINE = 64;               // bytes of a cache line
constexpr int64_t PICKS_PER_THREAD = 128;  // fewer do not pay for waking a thread

// Picks between asking for a row and using it, where a pick touches `bytes`: what is asked for has to fit the second level
// of cache beside everything else.
constexpr int64_t MOST_AHEAD = 64, BYTES_AHEAD = 64 << 10;
inline int64_t picks_ahead(int64_t bytes) { return std::min(MOST_AHEAD, std::max<int64_t>(4, BYTES_AHEAD / (bytes + 1))); }

struct Picks {
    const int64_t* rows;
    const int64_t* blocks;  // null: all 0
    const int64_t* tokens;  // null: pick i belongs to token i / per_token
    int64_t count, per_token;

    int64_t token(int64_t i) const { return tokens ? tokens[i] : i / per_token; }
    int64_t block(int64_t i) const { return blocks ? blocks[i] : 0; }
    // Where thread `part` of `parts` starts, moved on to the first pick of a token.
    int64_t start(int64_t part, int64_t parts) const {
        int64_t i = count * part / parts;
        if (i == 0 || i >= count) return i;
        if (!tokens) return std::min(count, (i + per_token - 1) / per_token * per_token);
        while (i < count && tokens[i] == tokens[i - 1]) ++i;
        return i;
    }
    // Where the picks of the token of pick i end, at most `end`.
    int64_t same_token(int64_t i, int64_t end) const {
        if (!tokens) return std::min(end, (i / per_token + 1) * per_token);
        const int64_t own = tokens[i];
        while (++i < end && tokens[i] == own) {
        }
        return i;
    }
    bool inside(int64_t num_rows, int64_t num_blocks) const {
        bool good = true;
        for (int64_t i = 0; i < count; ++i) good &= static_cast<uint64_t>(rows[i]) < static_cast<uint64_t>(num_rows);
        for (int64_t i = 0; i < count && blocks; ++i)
            good &= static_cast<uint64_t>(blocks[i]) < static_cast<uint64_t>(num_blocks);
        return good;
    }
};

// Run work(part, parts) on up to `threads` threads.
template <typename Work>
void in_parallel(int64_t threads, const Picks& picks, const Work& work) {
    in_parallel(threads, picks.count, PICKS_PER_THREAD, work);
}

// The picks whose rows thread `part` of `parts` owns, in order; listed a little ahead of their use.
class OwnPicks {
  public:
    OwnPicks(const Picks& picks, int64_t part, int64_t parts, int64_t ahead)
        : picks_(picks), part_(part), parts_(parts), ahead_(ahead) {}

    // Goes on to the next pick and gives it; -1 after the last.
    int64_t next() {
        ++now_;
        if (parts_ == 1) return now_ < picks_.count ? now_ : -1;
        while (listed_ <= now_ + ahead_ && seen_ < picks_.count) list();
        return now_ < listed_ ? places_[now_ % SIZE] : -1;
    }
    // The pick that comes `ahead` later; -1 where there is none.
    int64_t coming() const {
        const int64_t later = now_ + ahead_;
        if (parts_ == 1) return later < picks_.count ? later : -1;
        return later < listed_ ? places_[later % SIZE] : -1;
    }
    // The token of the present pick.
    int64_t token(int64_t i) {
        if (picks_.tokens) return picks_.tokens[i];
        if (i >= token_end_) {  // no division for every pick
            token_ = i / picks_.per_token;
            token_end_ = (token_ + 1) * picks_.per_token;
        }
        return token_;
    }

    // Evenly spread by the upper bits of a product (Fibonacci hashing), because popular rows may be neighbours.
    static int64_t owner(int64_t row, int64_t parts) {
        const uint64_t spread = (static_cast<uint64_t>(row) * 0x9E3779B97F4A7C15u) >> 32;
        return static_cast<int64_t>((spread * static_cast<uint64_t>(parts)) >> 32);
    }

  private:
    static constexpr int64_t SIZE = 256, STEP = 128;  // powers of two
    static_assert(MOST_AHEAD + 1 + STEP <= SIZE, "what is listed overwrites what is needed");

    // No branch depends on an owner: it would be guessed wrong half of the time.
    void list() {
        const int64_t stop = std::min(picks_.count, seen_ + STEP);
        for (; seen_ < stop; ++seen_) {
            places_[listed_ % SIZE] = seen_;
            listed_ += owner(picks_.rows[seen_], parts_) == part_;
        }
    }

    const Picks& picks_;
    int64_t part_, parts_, ahead_, now_ = -1, listed_ = 0, seen_ = 0, token_ = 0, token_end_ = 0;
    int64_t places_[SIZE];
};

// A token's vector in Acc, each slice in the order of strips of Order; made once for all its picks.
template <typename Table, typename Acc, typename Order = Table>
class TokenVector {
  public:
    TokenVector(const Table* all, int64_t width, int64_t slice) : all_(all), width_(width), slice_(slice) {
        if (!std::is_same<Table, Acc>::value) wide_.resize(static_cast<size_t>(width));
    }
    const Acc* at(int64_t token) {
        const Table* from = all_ + token * width_;
        if constexpr (std::is_same<Table, Acc>::value) {
            return from;
        } else {
            if (token == token_) return wide_.data();
            token_ = token;
            if constexpr (std::is_same<Table, Order>::value)
                for (int64_t j = 0; j < width_; j += slice_) convert_row(from + j, slice_, wide_.data() + j);
            else
                for (int64_t j = 0; j < width_; ++j) wide_[static_cast<size_t>(j)] = widen(from[j]);
            return wide_.data();
        }
    }

  private:
    const Table* all_;
    int64_t width_, slice_, token_ = -1;
    std::vector<Acc> wide_;
};

// A table, or the gradient of one; may be null.
template <typename T>
struct Rows {
    T* data;
    int64_t width;

    T* at(int64_t row) const { return data + row * width; }
    int64_t bytes() const { return data ? width * static_cast<int64_t>(sizeof(T)) : 0; }
    // Into the second level of cache: the rows of all picks that are under way would crowd the first. Rows that are written
    // to are asked for in the same way, because a request to own a line holds one of the few buffers of the first level
    // until it comes.
    void ask(int64_t row) const {
        const char* first = reinterpret_cast<const char*>(at(row));
        const int64_t count = bytes();
#pragma GCC unroll 6
        for (int64_t i = 0; i < count; i += LINE) __builtin_prefetch(first + i, 0, 2);
    }
};

}  // namespace umv2
