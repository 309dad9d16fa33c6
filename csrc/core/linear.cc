#include "core/linear.h"

#include "core/linears/forms.h"

namespace nomatmul {

void Linear::declare(const Description& description, const std::string& name, const Isa& isa,
                     Tensors& tensors, int halves) {
  outputs_ = description.whole("outputs", 1, kMaxElements);
  inputs_ = description.whole("inputs", 1, kMaxElements);
  const std::string owner = description.flag("tied") ? "embedding" : name;
  const LinearParts parts{description, name, owner, isa, tensors, outputs_, inputs_, halves};
  const bool exact = description.flag("exact"), groups = description.flag("scale_group");
  MakeLinear* make =
      choose<MakeLinear*>("linear", description.kind,
                          {{"ternary", groups ? make_panel_linear : make_ternary_linear},
                           {"int8", exact ? make_panel_linear : make_dense_linear},
                           {"float", exact ? make_row_linear : make_dense_linear}});
  ternary_ = make == make_ternary_linear;
  form_ = make(parts);
  shared_input_ = form_->shared_input();
}

}  // namespace nomatmul
