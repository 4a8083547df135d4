# Nodes of a fleet on OpenStack. Create these files beside this one first:
#
#   bakehouse build && qemu-img convert -O qcow2 build/app/acme-app_1.raw app.qcow2    # each group
#   bakehouse ticket app-1 -o app-1.ticket                                             # each node
#
# `terraform validate` checks this file without an account. A ticket is a secret until its node has joined, and
# Terraform's state contains it. Keep the state as safe as other secrets, or give tickets a short validity.

terraform {
  required_providers {
    openstack = {
      source  = "terraform-provider-openstack/openstack"
      version = "~> 3.0"
    }
  }
}

variable "nodes" {
  description = "Group and flavor of each node in fleet.toml."
  type        = map(object({ group = string, flavor = string }))
  default = {
    "hub-1"     = { group = "hub", flavor = "m1.small" }
    "hub-2"     = { group = "hub", flavor = "m1.small" }
    "hub-3"     = { group = "hub", flavor = "m1.small" }
    "db-1"      = { group = "db", flavor = "m1.large" }
    "db-2"      = { group = "db", flavor = "m1.large" }
    "app-1"     = { group = "app", flavor = "m1.large" }
    "app-2"     = { group = "app", flavor = "m1.large" }
    "monitor-1" = { group = "monitor", flavor = "m1.medium" }
  }
}

variable "network" {
  description = "Name of a network from which the nodes reach the hubs' endpoints."
  type        = string
}

resource "openstack_images_image_v2" "group" {
  for_each         = toset([for node in var.nodes : node.group])
  name             = "bakehouse-${each.key}"
  local_file_path  = "${path.module}/${each.key}.qcow2"
  container_format = "bare"
  disk_format      = "qcow2"
  properties = {
    hw_firmware_type = "uefi"
    hw_machine_type  = "q35"
    hw_rng_model     = "virtio"
  }
}

# Places the nodes on different physical hosts, as far as there are enough hosts.
resource "openstack_compute_servergroup_v2" "apart" {
  name     = "bakehouse"
  policies = ["soft-anti-affinity"]
}

resource "openstack_compute_instance_v2" "node" {
  for_each    = var.nodes
  name        = each.key
  image_id    = openstack_images_image_v2.group[each.value.group].id
  flavor_name = each.value.flavor
  # The ticket. Nodes read user data from the config drive and do not query the metadata service.
  user_data    = file("${path.module}/${each.key}.ticket")
  config_drive = true
  network {
    name = var.network
  }
  scheduler_hints {
    group = openstack_compute_servergroup_v2.apart.id
  }
  lifecycle {
    # Nodes update themselves, and a node that has joined needs no new ticket.
    ignore_changes = [image_id, user_data]
  }
}
