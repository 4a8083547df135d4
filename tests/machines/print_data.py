"""Runs in `bakehouse odoo shell`: makes what print_reports.py prints."""

company = env.company  # noqa: F821
company.write({"name": "ACME Việt Nam", "report_header": "Chất lượng", "report_footer": "MST 0312345678"})
company.external_report_layout_id = env.ref("web.external_layout_standard")  # noqa: F821
if not env["account.journal"].search([("type", "=", "sale")]):  # noqa: F821
    env["account.chart.template"].try_loading("generic_coa", company=company, install_demo=False)  # noqa: F821
partner = env["res.partner"].create({"name": "Công ty Đại Phát", "city": "Hà Nội", "lang": "en_US"})  # noqa: F821
names = ["Cà phê Đắk Lắk", "قهوة عربية", "有机绿茶"]
products = [env["product.product"].create({"name": name, "list_price": 10.5, "is_storable": True}) for name in names]  # noqa: F821
lines = [(0, 0, {"product_id": products[n % 3].id, "quantity": 1, "price_unit": 10}) for n in range(60)]
move = env["account.move"].create(  # noqa: F821
    {"move_type": "out_invoice", "partner_id": partner.id, "invoice_date": "2026-11-30", "invoice_line_ids": lines}
)
move.action_post()
order = env["sale.order"].create(  # noqa: F821
    {"partner_id": partner.id, "order_line": [(0, 0, {"product_id": product.id}) for product in products]}
)
order.action_confirm()
env["ir.ui.view"].create(  # noqa: F821
    {
        "type": "qweb",
        "name": "bakehouse_pages",
        "key": "bakehouse.pages",
        "arch": """<t t-name="bakehouse.pages"><t t-call="web.html_container"><t t-call="web.external_layout">
        <div class="page"><t t-foreach="range(2000)" t-as="n"><p style="page-break-before: always" t-out="n"/></t></div>
        </t></t></t>""",
    }
)
env["ir.actions.report"].create(  # noqa: F821
    {"name": "Pages", "model": "res.partner", "report_name": "bakehouse.pages", "report_type": "qweb-pdf"}
)
env.cr.commit()  # noqa: F821
print(f"invoice={move.id} picking={order.picking_ids.id} order={order.id} partner={partner.id}")
