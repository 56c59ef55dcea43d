// The dispatch tables themselves, for acmix_describe().
#pragma once

#include <cstddef>

#include "acmix/launch.h"

namespace acmix {

template <class Problem>
struct Table {
    const Entry<Problem>* rows;
    std::size_t size;

    const Entry<Problem>* begin() const { return rows; }
    const Entry<Problem>* end() const { return rows + size; }
};

// In the order in which find() takes them: tensor cores first; among the rows of a kernel, the smallest head_dim first.
template <class Problem>
Table<Problem> table();

const char* name(Dtype);
const char* name(Layout);
const char* name(Kernel);

}  // namespace acmix
