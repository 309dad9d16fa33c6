#include "core/linear.h"

#include "core/linears/forms.h"

namespace nomatmul {

void Linear::declare(const Description& description, const std::string& name, const Isa& isa,
                     Tensors& tensors, int halves) {
  outputs_ = description.whole("outputs", 1, kMaxElements);
  inputs_ = description.whole("inputs", 1, kMaxElements);
  const LinearParts parts{description, name, isa, tensors, outputs_, inputs_, halves};
  MakeLinear* make = choose<MakeLinear*>("linear", description.kind,
                                         {{"ternary", make_ternary_linear},
                                          {"int8", make_dense_linear},
                                          {"float", make_dense_linear}});
  ternary_ = make == make_ternary_linear;
  form_ = make(parts);
  shared_input_ = form_->shared_input();
}

}  // namespace nomatmul
