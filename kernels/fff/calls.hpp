// What the fast feedforward kernels share: outcomes, threads, memory, and the choice of type and activation.
#pragma once

#include <cstdlib>
#include <new>
#include <stdexcept>
#include <vector>
#if defined(_OPENMP)
#include <omp.h>
#endif

#include "native/tiles.hpp"

namespace fff {

using namespace tiles;

enum Outcome { FINE = 0, OUT_OF_RANGE = 1, NO_MEMORY = 2 };

constexpr int64_t LINE = 16;  // floats of a cache line

inline int64_t padded(int64_t size) { return (size + PANEL - 1) / PANEL * PANEL; }

// Floats that need no construction, on a cache line; std::bad_alloc where there is no memory.
class Buffer {
public:
    explicit Buffer(int64_t size)
        : at_(static_cast<float*>(std::aligned_alloc(4 * LINE, 4 * size_t(size / LINE * LINE + LINE)))) {
        if (!at_) throw std::bad_alloc();
    }
    ~Buffer() { std::free(at_); }
    Buffer(const Buffer&) = delete;
    Buffer& operator=(const Buffer&) = delete;
    float* at() const { return at_; }

private:
    float* at_;
};

inline int thread_number() {
#if defined(_OPENMP)
    return omp_get_thread_num();
#else
    return 0;
#endif
}

// work(item, thread) for every item. Nothing in it may throw.
template <class Work>
inline void in_parallel(int64_t items, int threads, Work work) {
    if (items <= 1 || threads <= 1) {
        for (int64_t i = 0; i < items; ++i) work(i, 0);
        return;
    }
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1)
    for (int64_t i = 0; i < items; ++i) work(i, thread_number());
}

// work(integral_constant<activation>)
template <class Work>
TILES_INLINE void with_activation(int64_t activation, Work work) {
    switch (activation) {
        case simd::gelu: return work(std::integral_constant<int, simd::gelu>{});
        case simd::gelu_tanh: return work(std::integral_constant<int, simd::gelu_tanh>{});
        case simd::quick_gelu: return work(std::integral_constant<int, simd::quick_gelu>{});
        default: return work(std::integral_constant<int, simd::relu>{});
    }
}

// work(S{}), where only the type of its argument matters; memory that runs out becomes an outcome.
template <class Work>
inline int with_type(int64_t is_bf16, Work work) {
    try {
        return is_bf16 ? work(bf16{}) : work(float{});
    } catch (const std::bad_alloc&) {
        return NO_MEMORY;
    } catch (const std::length_error&) {
        return NO_MEMORY;
    }
}

template <class S>
TILES_INLINE void widen_row(const S* from, float* to, int64_t size) {
    each_vector(size, [&](int64_t n, int count) TILES_LAMBDA { store_some(to + n, load_some(from + n, count), count); });
}

// A row as floats: where it lies, or widened into `room`.
TILES_INLINE const float* as_floats(const float* row, float*, int64_t) { return row; }
TILES_INLINE const float* as_floats(const bf16* row, float* room, int64_t size) {
    widen_row(row, room, size);
    return room;
}
template <class S>
constexpr int64_t room_for_floats(int64_t size) { return std::is_same<S, float>::value ? 0 : padded(size); }

}  // namespace fff
