// Settings for the served ids of ComfyUI_IPAdapter_plus, and the menu entry that rewrites a workflow.
import { api } from "/scripts/api.js";
import { app } from "/scripts/app.js";

const HEADING = ["IP-Adapter", "ComfyUI_IPAdapter_plus"];

function tell(severity, summary, detail) {
  app.extensionManager.toast.add({ severity, summary, detail, life: 30000 });
}

async function rewrite() {
  const answer = await api.fetchApi("/ip_adapter/convert", {
    method: "POST",
    body: JSON.stringify(app.graph.serialize()),
  });
  const made = await answer.json().catch(() => ({}));
  if (!answer.ok || !made.workflow) {
    const detail = made.error ?? `ComfyUI answered ${answer.status} ${answer.statusText}`;
    tell("error", "The workflow cannot be rewritten", detail);
    return;
  }
  if (!made.report.length) {
    tell("info", "Nothing to rewrite", "There is no node of ComfyUI_IPAdapter_plus.");
    return;
  }
  await app.loadGraphData(made.workflow);
  tell("info", "Rewritten with native nodes", made.report.join("\n"));
}

app.registerExtension({
  name: "comfyui-ip-adapter.ipadapter-plus",
  settings: [
    {
      id: "IPAdapter.ServeIds",
      name: "Serve the node ids of ComfyUI_IPAdapter_plus where nobody else does",
      tooltip: "After a restart of ComfyUI.",
      category: [...HEADING, "ids"],
      type: "boolean",
      defaultValue: true,
    },
    {
      id: "IPAdapter.LikeTheOldPack",
      name: "Pictures of these nodes as ComfyUI_IPAdapter_plus made them",
      tooltip:
        "Without the middle block, with a black picture in place of training's empty one, and " +
        "with its masks' resampling.",
      category: [...HEADING, "like the old pack"],
      type: "boolean",
      defaultValue: false,
    },
  ],
  commands: [
    {
      id: "IPAdapter.Rewrite",
      label: "Rewrite ComfyUI_IPAdapter_plus nodes",
      icon: "pi pi-sync",
      function: rewrite,
    },
  ],
  menuCommands: [{ path: ["Edit"], commands: ["IPAdapter.Rewrite"] }],
});
