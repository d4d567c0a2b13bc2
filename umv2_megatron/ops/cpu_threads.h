// How the kernels for CPUs share work out over threads. The number of threads never decides an order of sums.

#pragma once

#include <algorithm>
#include <cstdint>
#ifdef _OPENMP
#include <omp.h>
#endif

namespace umv2 {

// One copy of the code for one thread and for several: two could be vectorized, and so rounded, differently.
#if defined(__clang__)
#define UMV2_ONE_COPY __attribute__((noinline))
#else
#define UMV2_ONE_COPY __attribute__((noipa))
#endif

template <typename Work>
UMV2_ONE_COPY void one_copy(const Work& work, int64_t part, int64_t parts) {
    work(part, parts);
}

// Run work(part, parts) on up to `threads` threads; fewer where each would have less than `least` of `items`.
template <typename Work>
void in_parallel(int64_t threads, int64_t items, int64_t least, const Work& work) {
    threads = std::max<int64_t>(1, std::min(threads, items / least));
#ifdef _OPENMP
    if (threads > 1) {
#pragma omp parallel num_threads(static_cast<int>(threads))
        one_copy(work, static_cast<int64_t>(omp_get_thread_num()), static_cast<int64_t>(omp_get_num_threads()));
        return;
    }
#endif
    one_copy(work, 0, 1);
}

// to [width] += the rows of parts [count, width], in their order; to and parts may not overlap.
inline void add_up(const float* parts, int64_t count, int64_t width, float* to) {
    for (int64_t i = 0; i < count; ++i)
        for (int64_t j = 0; j < width; ++j) to[j] += parts[i * width + j];
}

}  // namespace umv2
