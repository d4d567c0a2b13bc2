// How the kernels for CPUs share work out over threads. The number of threads never decides an order of sums.

#pragma once

#include <algorithm>
#include <cstdint>
#ifdef _OPENMP
#include <omp.h>
#endif

namespace umv2 {

// Run work(part, parts) on up to `threads` threads; fewer where each would have less than `least` of `items`.
template <typename Work>
void in_parallel(int64_t threads, int64_t items, int64_t least, const Work& work) {
    threads = std::max<int64_t>(1, std::min(threads, items / least));
#ifdef _OPENMP
    if (threads > 1) {
#pragma omp parallel num_threads(static_cast<int>(threads))
        work(static_cast<int64_t>(omp_get_thread_num()), static_cast<int64_t>(omp_get_num_threads()));
        return;
    }
#endif
    work(0, 1);
}

}  // namespace umv2
