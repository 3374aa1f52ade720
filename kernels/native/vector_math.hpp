// Vectors of fp32 and the functions the kernels need on them: one source for AVX-512 (16 lanes), AVX2 (8) and the rest
// (4, by the compiler's own vector extension: NEON, SSE).
//
// Why not the compiler's vectorised libm: it needs -ffast-math, which drops NaN. Here NaN comes out where NaN goes in,
// infinities give the limit (or NaN where the formula has inf - inf or 0 inf, as torch), and no function branches.
//
// Largest error against fp64, measured over all magnitudes on AVX2 (tests/oracle/test_vector_math.py holds these):
//
//     exp, exp_negative, log1p          8e-8, 8e-8, 1e-7     relative
//     softplus, sigmoid, tanh, erf      1.2e-7 to 1.6e-7     relative
//     gelu, gelu_tanh, quick_gelu       8e-8 to 1.3e-7       of max(1, |x|)
//     their slopes                      1.6e-7 to 1.8e-7     absolute
//
// exp_negative, which the rest is built on, is zero below exp(-87.3), that is, never denormal.
// Operators +, -, *, / and comparisons are the compiler's. `fma` rounds once where the processor can, twice elsewhere.

#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <utility>

#if defined(__x86_64__) || defined(__i386__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

namespace simd {

#if defined(__AVX512F__)
constexpr int lanes = 16;
#elif defined(__AVX2__)
constexpr int lanes = 8;
#else
constexpr int lanes = 4;
#endif

typedef float F __attribute__((vector_size(4 * lanes)));
typedef int32_t I __attribute__((vector_size(4 * lanes)));  // also masks: -1 true, 0 false
typedef uint32_t U __attribute__((vector_size(4 * lanes)));
typedef uint16_t H __attribute__((vector_size(2 * lanes)));

struct bf16 { uint16_t bits; };
struct f16 { uint16_t bits; };

// ---- lanes ----

inline F splat(float x) { return x - F{}; }  // not F{} + x: that has no -0
inline F select(I mask, F a, F b) { return mask ? a : b; }
inline F max(F a, F b) { return a > b ? a : b; }  // where either is NaN: b
inline F min(F a, F b) { return a < b ? a : b; }  // where either is NaN: b
inline F abs(F x) { return (F)((U)x & 0x7fffffffu); }
inline F with_sign_of(F magnitude, F sign) { return (F)((U)magnitude | ((U)sign & 0x80000000u)); }

inline F fma(F a, F b, F c) {  // a b + c
#if defined(__AVX512F__)
    return (F)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__AVX2__) && defined(__FMA__)
    return (F)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__aarch64__)
    return (F)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
    return a * b + c;
#endif
}

inline float sum(F x) {  // by halves, always in the same order
    float part[lanes];
    std::memcpy(part, &x, sizeof x);
    for (int half = lanes / 2; half; half /= 2)
        for (int i = 0; i < half; ++i) part[i] += part[i + half];
    return part[0];
}

inline float largest(F x) {
    float part[lanes];
    std::memcpy(part, &x, sizeof x);
    for (int half = lanes / 2; half; half /= 2)
        for (int i = 0; i < half; ++i) part[i] = part[i] > part[i + half] ? part[i] : part[i + half];
    return part[0];
}

#if defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#define SIMD_PICK(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#endif
#endif
#ifndef SIMD_PICK
#define SIMD_PICK(a, b, ...) __builtin_shuffle(a, b, I{__VA_ARGS__})
#endif

namespace detail {

// Swaps the upper right with the lower left quarter of all squares of 2 step x 2 step.
template <int step, int... lane>
inline void swap_quarters(F (&row)[lanes], std::integer_sequence<int, lane...> every) {
    for (int r = 0; r < lanes; ++r) {
        if (r & step) continue;
        const F a = row[r], b = row[r + step];
        row[r] = SIMD_PICK(a, b, (lane & step ? lanes + (lane ^ step) : lane)...);
        row[r + step] = SIMD_PICK(a, b, (lane & step ? lanes + lane : (lane ^ step))...);
    }
    if constexpr (step > 1) swap_quarters<step / 2>(row, every);
}

}  // namespace detail

inline void transpose(F (&row)[lanes]) {  // a square of lanes x lanes
    detail::swap_quarters<lanes / 2>(row, std::make_integer_sequence<int, lanes>{});
}

// ---- memory: any alignment; `n` in 0..lanes takes the first n, the rest are read as 0 and never written ----

inline F load(const float* at) {
    F x;
    std::memcpy(&x, at, sizeof x);
    return x;
}

inline void store(float* at, F x) { std::memcpy(at, &x, sizeof x); }

inline F load(const float* at, int n) {
#if defined(__AVX512F__)
    return (F)_mm512_maskz_loadu_ps((__mmask16)((1u << n) - 1u), at);
#elif defined(__AVX2__)
    const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    return (F)_mm256_maskload_ps(at, _mm256_cmpgt_epi32(_mm256_set1_epi32(n), lane));
#else
    F x = {};
    std::memcpy(&x, at, 4 * static_cast<size_t>(n));
    return x;
#endif
}

inline void store(float* at, F x, int n) {
#if defined(__AVX512F__)
    _mm512_mask_storeu_ps(at, (__mmask16)((1u << n) - 1u), (__m512)x);
#elif defined(__AVX2__)
    const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    _mm256_maskstore_ps(at, _mm256_cmpgt_epi32(_mm256_set1_epi32(n), lane), (__m256)x);
#else
    std::memcpy(at, &x, 4 * static_cast<size_t>(n));
#endif
}

inline F widen(H bits) { return (F)(__builtin_convertvector(bits, U) << 16); }  // of bf16

inline H narrow(F x) {  // to bf16: to nearest, ties to even; NaN stays NaN
    const U bits = (U)x, high = bits >> 16;
    const U rounded = (bits + 0x7fffu + (high & 1u)) >> 16;
    return __builtin_convertvector((U)select(x == x, (F)rounded, (F)(high | 0x40u)), H);
}

inline H load_halves(const void* at) {
    H x;
    std::memcpy(&x, at, sizeof x);
    return x;
}

inline H load_halves(const void* at, int n) {
    H x = {};
    std::memcpy(&x, at, 2 * static_cast<size_t>(n));
    return x;
}

inline F load(const bf16* at) { return widen(load_halves(at)); }
inline F load(const bf16* at, int n) { return widen(load_halves(at, n)); }

inline void store(bf16* at, F x) {
    const H bits = narrow(x);
    std::memcpy(at, &bits, sizeof bits);
}

inline void store(bf16* at, F x, int n) {
    const H bits = narrow(x);
    std::memcpy(at, &bits, 2 * static_cast<size_t>(n));
}

inline F widen_f16(H bits) {
#if defined(__AVX512F__)
    return (F)_mm512_cvtph_ps((__m256i)bits);
#elif defined(__AVX2__) && defined(__F16C__)
    return (F)_mm256_cvtph_ps((__m128i)bits);
#else
    const U wide = __builtin_convertvector(bits, U), sign = (wide & 0x8000u) << 16, rest = (wide & 0x7fffu) << 13;
    const F scaled = (F)rest * 0x1p112f;  // exponent bias 127 less 15; also right for denormals
    const I special = (wide & 0x7c00u) == 0x7c00u;
    return (F)((U)select(special, (F)(rest | 0x7f800000u), scaled) | sign);
#endif
}

inline F load(const f16* at) { return widen_f16(load_halves(at)); }
inline F load(const f16* at, int n) { return widen_f16(load_halves(at, n)); }

// ---- functions ----

namespace detail {

constexpr float magic = 0x1.8p23f;  // x + magic has round(x) in its lowest bits
constexpr float log2_e = 1.44269504f;
constexpr float ln2_high = 0.693359375f, ln2_low = -2.12194440e-4f;

struct Reduced { F mantissa; I exponent; };  // exp(x) = mantissa 2**exponent

inline Reduced reduced_exp(F x) {
    const F shifted = fma(x, splat(log2_e), splat(magic)), n = shifted - magic;
    const F r = fma(n, splat(-ln2_low), fma(n, splat(-ln2_high), x));
    F p = splat(1.381417297e-03f);
    p = fma(p, r, splat(8.368923052e-03f));
    p = fma(p, r, splat(4.166840808e-02f));
    p = fma(p, r, splat(1.666651893e-01f));
    p = fma(p, r, splat(4.999999333e-01f));
    return {fma(p, r * r, r) + 1.0f, (I)shifted - (I)splat(magic)};
}

inline F power_of_2(I n) { return (F)((n + 127) << 23); }  // n in -127 (which gives 0) to 127

}  // namespace detail

inline F exp(F x) {  // also where it overflows or is denormal
    const detail::Reduced e = detail::reduced_exp(min(splat(89.0f), max(splat(-105.0f), x)));
    const I half = e.exponent >> 1;
    return e.mantissa * detail::power_of_2(half) * detail::power_of_2(e.exponent - half);
}

inline F exp_negative(F x) {  // for x <= 0, a third cheaper; 0 below -87.7
    const detail::Reduced e = detail::reduced_exp(max(splat(-88.0f), x));
    return e.mantissa * detail::power_of_2(e.exponent);
}

inline F log1p(F x) {  // for x >= 0, inf included
    const I large = x > 0x1p100f;
    const F y = select(large, x * 0x1p-64f, x), u = y + 1.0f;
    const I k = ((I)u - 0x3f3504f3) >> 23;  // u / 2**k in sqrt(1/2) .. sqrt(2)
    const F scale = (F)((127 - k) << 23), f = fma(y, scale, scale - 1.0f);
    F p = splat(7.0376836292e-2f);
    p = fma(p, f, splat(-1.1514610310e-1f));
    p = fma(p, f, splat(1.1676998740e-1f));
    p = fma(p, f, splat(-1.2420140846e-1f));
    p = fma(p, f, splat(1.4249322787e-1f));
    p = fma(p, f, splat(-1.6668057665e-1f));
    p = fma(p, f, splat(2.0000714765e-1f));
    p = fma(p, f, splat(-2.4999993993e-1f));
    p = fma(p, f, splat(3.3333331174e-1f));
    const F ff = f * f;
    const F n = __builtin_convertvector(k, F) + select(large, splat(64.0f), F{});
    const F small = fma(n, splat(detail::ln2_low), fma(ff, f * p, -0.5f * ff));
    return select(x < HUGE_VALF, fma(n, splat(detail::ln2_high), f + small), x);  // inf and NaN as they came
}

inline F softplus(F x) { return max(F{}, x) + log1p(exp_negative(-abs(x))); }

struct Chance { F yes, no; };  // sigmoid(x) and sigmoid(-x), either without cancellation

inline Chance chance(F x) {
    const F e = exp_negative(-abs(x)), most = 1.0f / (1.0f + e), least = e * most;
    const I negative = x < 0.0f;
    return {select(negative, least, most), select(negative, most, least)};
}

inline F sigmoid(F x) { return chance(x).yes; }

inline F tanh(F x) {
    const F a = abs(x), s = x * x, e = exp_negative(-2.0f * a);
    F p = splat(-5.528604810e-03f);
    p = fma(p, s, splat(2.048328827e-02f));
    p = fma(p, s, splat(-5.369295879e-02f));
    p = fma(p, s, splat(1.333089964e-01f));
    p = fma(p, s, splat(-3.333326288e-01f));
    return select(a < 0.625f, fma(p * s, x, x), with_sign_of((1.0f - e) / (1.0f + e), x));
}

namespace detail {

// The upper tail of the normal distribution over its density without 1 / sqrt(2 pi): 0.5 erfcx(a / sqrt 2), a >= 0.
inline F tail_over_density(F a) {
    const F b = min(splat(14.5f), a), t = (b - 3.0f) / (b + 3.0f);  // beyond 14.5 the density is 0 in fp32
    F p = splat(5.316120956e-05f);
    p = fma(p, t, splat(1.150135501e-04f));
    p = fma(p, t, splat(-3.390121007e-04f));
    p = fma(p, t, splat(-9.832881840e-04f));
    p = fma(p, t, splat(2.904387134e-03f));
    p = fma(p, t, splat(6.131942295e-03f));
    p = fma(p, t, splat(-4.621326360e-02f));
    p = fma(p, t, splat(1.232250412e-01f));
    p = fma(p, t, splat(-2.064026204e-01f));
    return fma(p, t, splat(1.215139475e-01f));
}

struct Normal { F below, density; };  // P(X < x), and exp(-x x / 2)

inline Normal normal(F x) {
    const F a = abs(x), density = exp_negative(-0.5f * a * a), tail = density * tail_over_density(a);
    return {select(x < 0.0f, tail, 1.0f - tail), density};
}

}  // namespace detail

inline F erf(F x) {
    const F a = abs(x), s = x * x;
    F p = splat(7.853858979e-05f);
    p = fma(p, s, splat(-8.010194041e-04f));
    p = fma(p, s, splat(5.188327892e-03f));
    p = fma(p, s, splat(-2.685381216e-02f));
    p = fma(p, s, splat(1.128358516e-01f));
    p = fma(p, s, splat(-3.761262583e-01f));
    p = fma(p, s, splat(1.128379166e+00f));
    const F tail = 2.0f * exp_negative(-s) * detail::tail_over_density(1.41421356f * a);
    return select(a < 1.0f, p * x, with_sign_of(1.0f - tail, x));
}

// ---- activations, as kernels/fff/activations.py has them ----

enum Activation { gelu = 0, gelu_tanh = 1, quick_gelu = 2, relu = 3 };

struct Activated { F value, slope; };

// Both at once, for they share what is dear; what a caller ignores is not computed.
template <int activation>
inline Activated activated(F x) {
    if constexpr (activation == gelu) {
        const detail::Normal n = detail::normal(x);
        return {x * n.below, fma(0.398942280f * x, n.density, n.below)};
    } else if constexpr (activation == gelu_tanh) {
        constexpr float twice = 1.59576912f, cube = 0.044715f;  // 2 sqrt(2 / pi)
        const F xx = x * x;
        const Chance s = chance(twice * x * fma(splat(cube), xx, splat(1.0f)));
        return {x * s.yes, fma(x * s.yes * s.no, twice * fma(splat(3 * cube), xx, splat(1.0f)), s.yes)};
    } else if constexpr (activation == quick_gelu) {
        const Chance s = chance(1.702f * x);
        return {x * s.yes, s.yes * fma(1.702f * x, s.no, splat(1.0f))};
    } else {
        return {select(x <= 0.0f, F{}, x), select(x > 0.0f, splat(1.0f), F{})};
    }
}

template <int activation>
inline F activate(F x) { return activated<activation>(x).value; }

template <int activation>
inline F slope(F x) { return activated<activation>(x).slope; }

}  // namespace simd
