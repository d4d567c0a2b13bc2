// Touches rows at random places of tables as fast as it goes: what a lookup cannot be faster than. row_rates.py calls it.
//
// "read" adds up all numbers of a row and keeps nothing else; "add" reads all, adds a number to each and writes them.
// That number is zero, which the compiler does not know: one added to the bits of 0.0 gives a denormal number, with which
// the lookup that is measured in turns would compute up to five times as slowly. `ahead` rows before a row is used its cache
// lines are asked for, into the first or the second level; 0 leaves it to the processor.

#include <cstdint>
#include <cstring>

#include "cpu_product.h"
#include "cpu_threads.h"

namespace {

constexpr int64_t LINE = 64;
constexpr int64_t BYTES = umv2::VECTOR_BYTES;
typedef int32_t Vector __attribute__((vector_size(umv2::VECTOR_BYTES)));

struct Table {  // as in row_rates.py
    char* data;
    int64_t row_bytes;  // a multiple of 4
    int64_t add;        // or only read
};

template <int LEVEL>
inline void ask(const char* row, int64_t bytes) {
    for (int64_t i = 0; i < bytes; i += LINE) __builtin_prefetch(row + i, 0, LEVEL);
}

inline Vector read(const char* row, int64_t bytes) {
    Vector sum = {};
    int64_t i = 0;
    for (; i + BYTES <= bytes; i += BYTES) {
        Vector part;
        std::memcpy(&part, row + i, sizeof part);
        sum += part;
    }
    for (; i < bytes; i += 4) sum[0] += *reinterpret_cast<const int32_t*>(row + i);
    return sum;
}

inline void add(char* row, int64_t bytes, int32_t number) {
    int64_t i = 0;
    for (; i + BYTES <= bytes; i += BYTES) {
        Vector part;
        std::memcpy(&part, row + i, sizeof part);
        part += number;
        std::memcpy(row + i, &part, sizeof part);
    }
    for (; i < bytes; i += 4) *reinterpret_cast<int32_t*>(row + i) += number;
}

template <int LEVEL>
int32_t touch(const Table* tables, int64_t count, const int64_t* rows, int64_t picks, int64_t ahead, int64_t threads,
              int32_t number) {
    int32_t total = 0;
    umv2::in_parallel(threads, picks, 1, [&](int64_t part, int64_t parts) {
        Vector sum = {};
        const int64_t stop = picks * (part + 1) / parts;
        for (int64_t i = picks * part / parts; i < stop; ++i)
            for (int64_t k = 0; k < count; ++k) {
                const Table& table = tables[k];
                if (ahead && i + ahead < stop) ask<LEVEL>(table.data + rows[i + ahead] * table.row_bytes, table.row_bytes);
                char* row = table.data + rows[i] * table.row_bytes;
                if (table.add) add(row, table.row_bytes, number);
                else sum += read(row, table.row_bytes);
            }
        int32_t mine = 0;
        for (size_t i = 0; i < BYTES / sizeof(int32_t); ++i) mine += sum[i];
#pragma omp atomic
        total += mine;
    });
    return total;
}

}  // namespace

// Rows are distinct: no two threads change the same one. The result only keeps the compiler from leaving reads out.
extern "C" int32_t umv2_touch_rows(const Table* tables, int64_t count, const int64_t* rows, int64_t picks, int64_t ahead,
                                   int64_t level, int64_t threads, int64_t zero) {
    const int32_t number = static_cast<int32_t>(zero);
    return level == 1 ? touch<3>(tables, count, rows, picks, ahead, threads, number)
                      : touch<2>(tables, count, rows, picks, ahead, threads, number);
}
