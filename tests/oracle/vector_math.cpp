// The functions of native/vector_math.hpp over arrays, for the test beside this file.

#include <cstdint>

#include "native/vector_math.hpp"

namespace {

template <class Function>
void each(const float* x, float* y, int64_t n, Function function) {  // whole vectors, then a part of one
    int64_t i = 0;
    for (; i + simd::lanes <= n; i += simd::lanes) simd::store(y + i, function(simd::load(x + i)));
    const int rest = static_cast<int>(n - i);
    simd::store(y + i, function(simd::load(x + i, rest)), rest);
}

template <class Half>
void widened(const Half* x, float* y, int64_t n) {
    int64_t i = 0;
    for (; i + simd::lanes <= n; i += simd::lanes) simd::store(y + i, simd::load(x + i));
    const int rest = static_cast<int>(n - i);
    simd::store(y + i, simd::load(x + i, rest), rest);
}

}  // namespace

#define ENTRY(name, ...) \
    extern "C" void do_##name(const float* x, float* y, int64_t n) { \
        each(x, y, n, [](simd::F v) { return __VA_ARGS__(v); }); \
    }

ENTRY(exp, simd::exp)
ENTRY(exp_negative, simd::exp_negative)
ENTRY(log1p, simd::log1p)
ENTRY(softplus, simd::softplus)
ENTRY(sigmoid, simd::sigmoid)
ENTRY(tanh, simd::tanh)
ENTRY(erf, simd::erf)
ENTRY(gelu, simd::activate<simd::gelu>)
ENTRY(gelu_tanh, simd::activate<simd::gelu_tanh>)
ENTRY(quick_gelu, simd::activate<simd::quick_gelu>)
ENTRY(relu, simd::activate<simd::relu>)
ENTRY(gelu_slope, simd::slope<simd::gelu>)
ENTRY(gelu_tanh_slope, simd::slope<simd::gelu_tanh>)
ENTRY(quick_gelu_slope, simd::slope<simd::quick_gelu>)
ENTRY(relu_slope, simd::slope<simd::relu>)

extern "C" int lanes() { return simd::lanes; }
extern "C" void sum_and_largest(const float* x, float* y) {
    y[0] = simd::sum(simd::load(x));
    y[1] = simd::largest(simd::load(x));
}
extern "C" void from_bf16(const simd::bf16* x, float* y, int64_t n) { widened(x, y, n); }
extern "C" void from_f16(const simd::f16* x, float* y, int64_t n) { widened(x, y, n); }
extern "C" void to_bf16(const float* x, simd::bf16* y, int64_t n) {
    int64_t i = 0;
    for (; i + simd::lanes <= n; i += simd::lanes) simd::store(y + i, simd::load(x + i));
    const int rest = static_cast<int>(n - i);
    simd::store(y + i, simd::load(x + i, rest), rest);
}
