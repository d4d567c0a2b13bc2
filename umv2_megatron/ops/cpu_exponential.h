// e^x for the kernels for CPUs, in vector instructions of any CPU.

#pragma once

#include <cstdint>
#include <cstring>

namespace umv2 {

// e^x to 2 units in the last place between -87 and 88, and what it is there beyond; without a branch. x = n ln 2 + r,
// |r| <= ln(2) / 2, e^r by its Taylor polynomial.
inline float exponential(float x) {
    x = x < -87.0f ? -87.0f : x;
    x = x > 88.0f ? 88.0f : x;
    const float shift = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, which is in the last bits then
    const float shifted = x * 1.44269504f + shift, n = shifted - shift;
    const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    float power = 1.0f / 5040;
    power = power * r + 1.0f / 720;
    power = power * r + 1.0f / 120;
    power = power * r + 1.0f / 24;
    power = power * r + 1.0f / 6;
    power = power * r + 0.5f;
    power = power * r + 1.0f;
    power = power * r + 1.0f;
    int32_t bits;
    std::memcpy(&bits, &shifted, sizeof bits);
    bits = static_cast<int32_t>((static_cast<uint32_t>(bits) << 23) + 0x3f800000u);  // the rest of the shift overflows
    float scale;
    std::memcpy(&scale, &bits, sizeof scale);
    return power * scale;
}

}  // namespace umv2
